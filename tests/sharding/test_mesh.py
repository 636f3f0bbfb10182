"""Mesh sizes and names; layouts over several devices are in test_layouts.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType

from sharding.mesh import AXES, make_mesh


def test_all_axes_are_there() -> None:
    mesh = make_mesh({"data": 1}, tensor=1)
    assert mesh.axis_names == AXES == ("data", "fsdp", "stage", "sequence", "expert", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh(devices=jax.devices()[:1]) == mesh


def test_wrong_sizes_say_how_to_fix_them() -> None:
    with pytest.raises(ValueError, match=r"takes 4 devices and there are 1: .*host_platform_device_count"):
        make_mesh(data=2, tensor=2)
    with pytest.raises(ValueError, match=r"unknown mesh axes \['model'\]; the axes are data"):
        make_mesh({"model": 1})
    with pytest.raises(ValueError, match="1 or more"):
        make_mesh(data=0)


DEVICES = """
import jax, jax.numpy as jnp, warnings
from jax.sharding import NamedSharding, PartitionSpec
from sharding.mesh import make_mesh
jax.jit(lambda x: x + 1)(1.0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    mesh = make_mesh(data=4)
print("PJRT_NPROC" in "".join(str(warning.message) for warning in caught))
x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("data")))
print(float(jax.jit(lambda x: x.sum())(x)))
"""


@pytest.mark.parametrize("threads", ["3", "32"])
def test_virtual_devices_are_kept_from_hanging(threads: str, tmp_path: Path) -> None:
    """No program of several devices in the compilation cache, and a warning where there are few threads."""
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PJRT_NPROC": threads, "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    run = subprocess.run([sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(threads == "3"), "28.0"]
    names = {path.name.rpartition("-")[0] for path in tmp_path.iterdir()}
    assert any("lambda" in name for name in names) and len(list(tmp_path.glob("*-cache"))) == 1, names
