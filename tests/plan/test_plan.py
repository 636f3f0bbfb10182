"""The command: what it prints for people and for programs, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindjax import cli
from mindjax.plan import compile as compiling
from mindjax.plan.compile import compile_step
from mindjax.plan.cost import Job
from mindjax.plan.hardware import Topology
from mindjax.plan.plan import model_config, stacks
from mindjax.plan.program import read, unexpected
from sharding.layout import Layout

KEYS = {
    "topology", "devices", "mesh", "hbm_bytes", "bytes_per_device", "fits", "flops_per_device", "collective_bytes",
    "predicted_step_s", "predicted_mfu", "compile_s",
}  # fmt: skip


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["plan", *arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.mark.parametrize(("topology", "mesh"), [("v5p:4x4x4", "fsdp=16,tensor=4"), ("h100:64", "fsdp=64")])
def test_cost_model_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path, topology: str, mesh: str) -> None:
    page = tmp_path / "plan.html"
    status, out, _ = plan(
        capsys, "--model", "qwen3-vl-30b-a3b", "--topology", topology, "--batch", "256", "--length", "8192", "--mesh",
        mesh, "--no-compile", "--json", "--html", str(page),
    )  # fmt: skip
    result = json.loads(out.splitlines()[-1])
    assert set(result) >= KEYS and result["compile_s"] is None
    assert status == 0 and result["fits"] and result["bytes_per_device"] < result["hbm_bytes"]
    sizes = dict(part.split("=") for part in mesh.split(","))
    assert {axis: size for axis, size in result["mesh"].items() if size > 1} == {a: int(n) for a, n in sizes.items()}
    assert {axis for axis, size in result["collective_bytes"].items() if size} == set(sizes)
    assert 0 < result["predicted_mfu"] < 1 and result["devices"] == 64
    assert "assumed" in out and "longest" in out
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3 and "http" not in text.partition("<body>")[2]


def test_compiled_on_virtual_devices(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = plan(
        capsys, "--model", "tiny", "--topology", "cpu:2", "--batch", "4", "--length", "96", "--images", "0", "--mesh",
        "tensor=2", "--remat", "full", "--micro-batches", "1", "--json",
    )  # fmt: skip
    result = json.loads(out.splitlines()[-1])
    assert status == 0 and result["compile_s"] > 0 and result["fits"]
    assert result["unexpected_gathers"] == [] and result["collective_bytes"]["tensor"] > 0
    assert result["flops_per_device"] == pytest.approx(result["cost_model"]["flops_per_device"], rel=0.1)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"--model": "qwen3-vl-9b"}, "did you mean 'qwen3-vl-"),
        ({"--topology": "v5q:4x4x4"}, "did you mean 'v5"),
        ({"--mesh": "fsdp=8"}, "takes 8 devices and v5p:2x2x1 has 4"),
        ({"--mesh": "tensors=4"}, "did you mean 'tensor'"),
        ({"--mesh": "expert=4"}, "this model has none; give the devices to data or fsdp"),
        ({"--batch": "6"}, "use --batch"),
        ({"--images": "99"}, "do not fit a row of 4096"),
        ({"--remat": "some"}, "write none, full"),
    ],
)
def test_mistakes_read_like_advice(capsys: pytest.CaptureFixture[str], changes: dict[str, str], advice: str) -> None:
    given = {
        "--model": "qwen3-vl-2b",
        "--topology": "v5p:2x2x1",
        "--batch": "8",
        "--length": "4096",
        "--mesh": "fsdp=4",
    }
    arguments = [part for pair in (given | changes).items() for part in pair]
    status, _, err = plan(capsys, *arguments, "--no-compile")
    assert status == 2 and advice in err


def test_without_a_tpu_compiler(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "find_libtpu", lambda: None)
    status, _, err = plan(
        capsys, "--model", "tiny", "--topology", "v5p:2x2x1", "--batch", "8", "--length", "128", "--mesh", "fsdp=4",
        "--images", "0",
    )  # fmt: skip
    assert status == 2 and "mindjax[plan]" in err and "--no-compile" in err


@pytest.mark.prove
@pytest.mark.parametrize(
    ("model", "layout"),
    [("tiny", "fsdp=4,tensor=2"), ("tiny-moe", "fsdp=2,tensor=2,expert=2"), ("tiny-moe", "expert=8,dispatch=ragged")],
)
def test_real_step_for_a_tpu_slice(model: str, layout: str) -> None:
    job = Job(model_config(model), Layout.parse(layout), batch=16, length=512, images=1, image_tokens=36, remat="full")
    compiled = compile_step(job, Topology.parse("v5p:2x2x2"))
    found = read(compiled.text, job.layout.sizes)
    assert not found.unknown_loops and not found.uncounted
    assert not unexpected(found, stacks(job.model), job.model.text.vocab_size, job.layout.sizes)
    exchanges = {collective.kind for collective in found.collectives if "expert" in collective.sent}
    assert ("ragged-all-to-all" in exchanges) == (job.layout.dispatch == "ragged")
