"""The device mesh: the names of its axes, and one function that makes it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

# From the slowest links to the fastest: tensor parallel exchanges in every layer, data parallel once a step.
AXES = ("data", "fsdp", "stage", "sequence", "expert", "tensor")


def make_mesh(sizes: dict[str, int] | None = None, *, devices: Sequence[jax.Device] | None = None, **axes: int) -> Mesh:
    """A mesh with all of `AXES`; those not given have size 1.

    Args:
      sizes: axis name -> size; `make_mesh({"data": 2})` and `make_mesh(data=2)` are the same.
      devices: what to use, in order; default: all.

    Raises:
      ValueError: for an unknown axis, a size below 1, or a product that is not the number of devices.
    """
    wanted = {**(sizes or {}), **axes}
    if unknown := sorted(set(wanted) - set(AXES)):
        raise ValueError(f"unknown mesh axes {unknown}; the axes are {', '.join(AXES)}")
    shape = [wanted.get(axis, 1) for axis in AXES]
    if min(shape) < 1:
        raise ValueError(f"mesh sizes must be 1 or more, not {wanted}")
    given = list(jax.devices() if devices is None else devices)
    if math.prod(shape) != len(given):
        raise ValueError(
            f"the mesh {wanted} takes {math.prod(shape)} devices and there are {len(given)}: change a size, or pass "
            "devices= (on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N)"
        )
    _guard_cpu(given)
    if devices is None:
        # Knows the torus. A mesh axis may take a part of one of its dimensions, which jax.make_mesh refuses.
        laid_out = mesh_utils.create_device_mesh(shape, given, allow_split_physical_axes=True)
    else:
        laid_out = np.asarray(given, dtype=object).reshape(shape)
    # Auto: under Explicit, jax's default, what lies outside of `shard_map` must be annotated or raises.
    return Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _guard_cpu(devices: Sequence[jax.Device]) -> None:
    """Keeps virtual CPU devices from waiting for each other for ever, as far as it can be told from here."""
    if devices[0].platform != "cpu" or len(devices) == 1:
        return
    # A program that XLA's CPU backend reads back from the cache does its collectives in any order: devices meet in
    # different ones, and hang, crash, or take each other's numbers.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    here = sum(device.process_index == jax.process_index() for device in devices)
    threads = int(os.environ.get("PJRT_NPROC") or os.cpu_count() or 1)
    if here > 1 and threads < 2 * here:
        warnings.warn(
            f"{here} CPU devices share {threads} threads of XLA, of which each collective blocks one for each device, "
            f"and may hang: set the environment variable PJRT_NPROC to {max(32, 4 * here)} before the first use of jax",
            stacklevel=3,
        )
