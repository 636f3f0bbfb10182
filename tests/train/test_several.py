"""Training in several processes, a real job over loopback, beside one process with as many devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Compiling is nearly all of the time, and what is compared does not depend on how well.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Per tensor, ||difference|| / ||reference||: with more than two devices, sums over them are taken in another order.
BOUND = 1e-5


def run(
    layout: str, workdir: Path, *, processes: int, devices: int, steps: int, job: str = "sft", kill_at: int = 0
) -> subprocess.CompletedProcess[str]:
    """`tests.train.several` in so many processes, with so many devices each; one process is no job."""
    program = ["-m", "tests.train.several", job, layout, str(workdir), str(steps)]
    launch = [
        "-m",
        "mindjax.cli",
        "launch",
        f"--processes={processes}",
        f"--devices-per-process={devices}",
        "--timeout=20",
    ]
    flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        [sys.executable, *(program if processes == 1 else [*launch, "--", "python", *program])],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PJRT_NPROC": "32", "KILL_AT": str(kill_at)},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=400,
    )


def result(
    done: subprocess.CompletedProcess[str], workdir: Path, processes: int
) -> tuple[list[list[float]], dict[str, Any]]:
    """([loss, gradient norm, tokens] of every step, the parameters)."""
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if '{"losses"' in line)
    report = json.loads(line[line.index("{") :])
    assert report["processes"] == processes
    return report["losses"], dict(np.load(workdir / "params.npz"))


def farthest(params: dict[str, Any], reference: dict[str, Any]) -> float:
    assert params.keys() == reference.keys()
    return max(float(np.linalg.norm(params[key] - value) / np.linalg.norm(value)) for key, value in reference.items())


def test_two_processes_train_as_one_bit_for_bit(tmp_path: Path) -> None:
    """Each loads half of the data and holds half of every weight, and they exchange them in every layer."""
    one = run("fsdp=2", tmp_path / "one", processes=1, devices=2, steps=3)
    two = run("fsdp=2", tmp_path / "two", processes=2, devices=1, steps=3)
    losses, reference = result(one, tmp_path / "one", 1)
    assert len(losses) == 3 and losses[0][0] > losses[2][0]
    again, params = result(two, tmp_path / "two", 2)
    assert again == losses
    for key, value in reference.items():
        np.testing.assert_array_equal(params[key], value, err_msg=key)
    # One progress line in all, and nothing that a second writer would have left twice.
    assert sum("sft 3/3" in line for line in two.stderr.splitlines()) == 1


@pytest.mark.prove
@pytest.mark.parametrize("layout", ["tensor=2", "data=2", "stage=2", "sequence=2"])
def test_every_axis_between_two_processes_is_exact(layout: str, tmp_path: Path) -> None:
    one = run(layout, tmp_path / "one", processes=1, devices=2, steps=3)
    two = run(layout, tmp_path / "two", processes=2, devices=1, steps=3)
    losses, reference = result(one, tmp_path / "one", 1)
    again, params = result(two, tmp_path / "two", 2)
    assert again == losses and farthest(params, reference) == 0.0


@pytest.mark.prove
@pytest.mark.parametrize("job", ["dpo", "gspo"])
def test_other_jobs_in_two_processes_are_exact(job: str, tmp_path: Path) -> None:
    one = run("fsdp=2", tmp_path / "one", processes=1, devices=2, steps=3, job=job)
    two = run("fsdp=2", tmp_path / "two", processes=2, devices=1, steps=3, job=job)
    losses, reference = result(one, tmp_path / "one", 1)
    again, params = result(two, tmp_path / "two", 2)
    assert losses[0] != losses[2] and again == losses and farthest(params, reference) == 0.0


@pytest.mark.prove
@pytest.mark.parametrize("layout", ["fsdp=4", "data=2,tensor=2"])
def test_two_processes_of_two_devices_stay_within_the_bound(layout: str, tmp_path: Path) -> None:
    one = run(layout, tmp_path / "one", processes=1, devices=4, steps=3)
    two = run(layout, tmp_path / "two", processes=2, devices=2, steps=3)
    losses, reference = result(one, tmp_path / "one", 1)
    again, params = result(two, tmp_path / "two", 2)
    np.testing.assert_allclose(again, losses, rtol=1e-6)
    assert farthest(params, reference) < BOUND


@pytest.mark.prove
def test_a_run_goes_on_after_a_process_was_killed_and_with_another_number_of_them(tmp_path: Path) -> None:
    """Killed in step 4, after the checkpoint of step 2; then one process, with both devices, ends the run."""
    whole = run("fsdp=2", tmp_path / "whole", processes=1, devices=2, steps=6)
    losses, reference = result(whole, tmp_path / "whole", 1)
    killed = run("fsdp=2", tmp_path / "run", processes=2, devices=1, steps=6, kill_at=4)
    assert killed.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 ended with signal SIGKILL" in killed.stderr
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert any("2" in name for name in saved) and not any("4" in name for name in saved), saved
    rest = run("fsdp=2", tmp_path / "run", processes=1, devices=2, steps=6)
    again, params = result(rest, tmp_path / "run", 1)
    assert again == losses and farthest(params, reference) == 0.0
