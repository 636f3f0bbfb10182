"""Loss and every gradient over many devices equal one device's, parameters loaded onto the mesh from a checkpoint."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sharding.layout import Layout

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5  # ||difference|| / ||reference|| per tensor, float32

# (model, objective, layout, remat): a product of every kind, and between them every axis, both ways to cut a row, a
# pipeline with rounds, stages that the layers do not divide, and fewer key/value heads than devices.
SMALLEST = (
    ("dense", "sft", "fsdp=2,tensor=2,stage=2", "none"),
    ("dense", "dpo", "data=2,tensor=4", "full"),
    ("dense", "sft", "stage=2,sequence=2,context=ring,pipeline_rounds=2,pipeline_microbatches=4", "none"),
    ("moe", "gspo", "data=2,sequence=2,expert=2,dispatch=ragged", ("attention", "mlp_hidden")),
    ("moe", "sft", "stage=2,tensor=2,expert=2", "none"),
)
AXES = ("data=2", "fsdp=2", "stage=2", "sequence=2", "sequence=4,context=ring", "tensor=2", "tensor=4")
PAIRS = (
    "data=4,fsdp=2", "fsdp=4,tensor=2", "stage=4,tensor=2", "stage=2,sequence=4,context=ring", "sequence=2,tensor=4",
    "data=2,stage=4", "fsdp=2,sequence=4",
)  # fmt: skip
EXPERT = ("expert=2", "expert=8", "expert=4,tensor=2", "expert=2,stage=4", "expert=2,fsdp=4", "expert=2,sequence=4")
THREE = (
    "stage=2,tensor=2,expert=2", "data=2,sequence=2,expert=2", "fsdp=2,tensor=2,stage=2", "fsdp=2,sequence=2,expert=2",
    "stage=2,sequence=2,tensor=2,pipeline_rounds=2", "data=2,sequence=2,tensor=2,context=ring",
)  # fmt: skip
FOUR = (
    "data=2,fsdp=2,stage=2,tensor=2", "data=2,sequence=2,expert=2,tensor=2", "fsdp=2,stage=2,sequence=2,expert=2",
    "stage=2,sequence=2,expert=2,tensor=2,context=ring",
)  # fmt: skip
MATRIX = (
    *(("dense", "sft", layout, "none") for layout in (*AXES, *PAIRS, *THREE[2:3])),
    *(("moe", "sft", layout, "none") for layout in (*AXES, *PAIRS, *EXPERT, *THREE, *FOUR)),
    *(("moe", objective, layout, "full") for objective in ("gspo", "dpo") for layout in (*THREE, *FOUR)),
    *(("dense", "sft", THREE[2], remat) for remat in ("full", ("qkv",), ("attention",), ("mlp_hidden",))),
)


def run(cases: tuple[tuple[str, str, str, Any], ...], folder: Path) -> list[dict[str, Any]]:
    """What every case gives, all in one process."""
    lines = [
        json.dumps({"model": m, "objective": o, "layout": layout, "remat": r, "folder": str(folder / str(i))})
        for i, (m, o, layout, r) in enumerate(cases)
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharding.layouts"],
        input="\n".join(lines),
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # Collectives block their threads, of which there are by default as many as devices.
            "PJRT_NPROC": "32",
            # Compiling is nearly all of the time, and what is compared does not depend on how well.
            "XLA_FLAGS": "--xla_force_host_platform_device_count=16 --xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
        },
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=7200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(case: tuple[str, str, str, Any], result: dict[str, Any]) -> None:
    assert result["smallest_norm"] > 1e-6, case  # no gradient is compared that is not there
    assert result["loss"] < TOLERANCE, case
    wrong = {path: error for path, error in result["gradients"].items() if not error < TOLERANCE}
    assert not wrong, case
    # The largest leaf, a matrix of the layers, is split over every axis that splits weights.
    layout = Layout.parse(case[2])
    split = [layout.fsdp, layout.stage, layout.tensor, layout.expert if case[0] == "moe" else 1]
    assert result["shards"] == math.prod(split), case


def test_a_layout_gives_what_one_device_gives(tmp_path: Path) -> None:
    for case, result in zip(SMALLEST, run(SMALLEST, tmp_path), strict=True):
        check(case, result)


@pytest.mark.prove
def test_every_layout(tmp_path: Path) -> None:
    results = run(MATRIX, tmp_path)
    rows = ["| model | objective | layout | recompute | loss | worst gradient |", "|---|---|---|---|---|---|"]
    for (model, objective, layout, remat), result in zip(MATRIX, results, strict=True):
        kept = remat if isinstance(remat, str) else "all but " + ", ".join(remat)
        worst = max(result["gradients"].values())
        rows.append(f"| {model} | {objective} | `{layout}` | {kept} | {result['loss']:.1e} | {worst:.1e} |")
    text = (
        "# Every layout against one device\n\nWritten by `make prove`. Relative differences in float32, the largest "
        f"over all tensors; the bound is {TOLERANCE:.0e}.\n\n" + "\n".join(rows) + "\n"
    )
    (ROOT / "docs" / "layouts.md").write_text(text)
    for case, result in zip(MATRIX, results, strict=True):
        check(case, result)
