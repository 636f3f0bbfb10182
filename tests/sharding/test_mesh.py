"""Mesh sizes and names; layouts over several devices are in test_layouts.py."""

from __future__ import annotations

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
