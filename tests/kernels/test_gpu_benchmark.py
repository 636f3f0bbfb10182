"""The arithmetic of the GPU benchmark: rates, floors, bars; it runs where there is no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kernels_cuda.benchmarks import gpu

CEILINGS = gpu.Ceilings(copy=4.0, bf16=800.0, fp8=1500.0)


def timing(kernel: str, tokens: int, seconds: float, *, by: str = gpu.OURS, shape: str = "2048x1536") -> gpu.Timing:
    return gpu.Timing(kernel, by, tokens, shape, seconds, flops=6e11, bytes=3.2e9)


def test_rates() -> None:
    measured = timing("gmm", 16384, 1e-3)
    assert measured.tflops == pytest.approx(600)
    assert measured.bandwidth == pytest.approx(3.2)
    assert CEILINGS.seconds(8e14, 1e12) == pytest.approx(1)  # arithmetic
    assert CEILINGS.seconds(8e14, 8e12) == pytest.approx(2)  # memory
    assert CEILINGS.seconds(7.5e14, 1e9, fp8=True) == pytest.approx(0.5)


def test_bars_take_the_slowest_shape_and_compare_like_with_like() -> None:
    timings = [
        timing("gmm", 16384, 0.8e-3),
        timing("gmm", 16384, 1.1e-3, shape="768x2048"),
        timing("gmm", 16384, 1.0e-3, by="torch"),
        timing("gmm", 16384, 1.3e-3, by="torch", shape="768x2048"),
        timing("gmm_decode", 64, 1e-3),
    ]
    found = {bar.what: bar for bar in gpu.bars(timings, CEILINGS)}
    assert found["bf16 gmm, 131k rows"].measured == pytest.approx(6e11 / 1.1e-3 / 1e12)
    assert not found["bf16 gmm, 131k rows"].passed
    assert found["bf16 gmm, 131k rows, over torch._grouped_mm"].measured == pytest.approx(1.3 / 1.1)
    assert found["decode, 64 tokens, of the copy bandwidth"].measured == pytest.approx(0.8)
    assert found["decode, 64 tokens, of the copy bandwidth"].passed
    assert not found["fp8 gmm, 131k rows"].passed, "what was not measured does not pass"
    assert "FAIL" in gpu.table(list(found.values()))


def test_routing_gives_every_token_its_experts() -> None:
    counts = gpu.routed(1000)
    assert counts.sum() == 1000 * gpu.CHOICES and counts.shape == (gpu.EXPERTS,)
    assert counts.max() <= 1000
    assert (gpu.routed(64) > 0).sum() > 100  # the decode case touches nearly every expert


@pytest.mark.parametrize("module", ["kernels_cuda.benchmarks.gpu", "kernels_cuda.gpu"])
def test_the_commands_explain_themselves(module: str) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--" in result.stdout
