"""Loss and gradients over eight devices equal one device's, parameters loaded onto the mesh from a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOLERANCE = 1e-5  # ||difference|| / ||reference|| per tensor, float32


@pytest.mark.parametrize(
    ("kind", "sizes", "shards"),
    [
        ("dense", {"data": 2, "fsdp": 2, "tensor": 2}, 4),
        ("moe", {"fsdp": 2, "expert": 2, "tensor": 2}, 8),
    ],
)
def test_a_mesh_gives_what_one_device_gives(kind: str, sizes: dict[str, int], shards: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharding.layouts", kind, json.dumps(sizes), str(tmp_path / "model")],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # Compiling is nearly all of the time, and what is compared does not depend on how well.
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
        },
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["shards"] == shards  # the largest leaf is split over all of these devices
    assert result["smallest_norm"] > 1e-6  # no gradient is compared that is not there
    assert result["loss"] < TOLERANCE
    wrong = {path: error for path, error in result["gradients"].items() if not error < TOLERANCE}
    assert not wrong
