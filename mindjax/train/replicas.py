"""Whether devices that should hold the same parameters do: sums of bits, compared over all copies of every shard."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mindjax.train.optimizer import path_of
from mindjax.types import Array

Params = dict[str, Any]
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class DivergedError(ValueError):
    """Devices that should hold the same parameters do not; the message names them."""


class ReplicaCheck:
    """Compares the copies of every parameter shard, on the devices of all processes.

    A copy goes astray silently, by a fault of a device or of a link: the loss still falls, and every replica trains
    another model. The sum of a shard's bits as unsigned integers, modulo 2^32, is exact and the same in any order, so
    that equal copies always agree; one changed bit, or any change of one element, changes it.

    Args:
      params: for their names, shapes and placement. Where no shard has a copy there is nothing to compare.
    """

    def __init__(self, params: Params):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        shardings = [leaf.sharding for _, leaf in leaves]
        meshes = {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}
        self._names = [path_of(path) for path, _ in leaves]
        self._copies: list[list[list[int]]] = []  # of each parameter: places in the mesh that hold the same shard
        self._good = 0
        if not meshes:
            return
        assert len(meshes) == 1 and all(isinstance(sharding, NamedSharding) for sharding in shardings)
        (mesh,) = meshes
        self._devices = list(mesh.devices.flat)
        self._copies = [_copies(leaf, self._devices) for _, leaf in leaves]

        def sums(*local: Array) -> Array:
            return jax.lax.all_gather(jnp.stack([_sum_of_bits(x) for x in local]), mesh.axis_names)

        # Not checked: to the compiler, copies are equal.
        specs = tuple(sharding.spec for sharding in shardings)
        self._sums = jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False))

    def start(self, params: Params) -> Array | None:
        """[devices, parameters] uint32 on the device; call it before `params` are donated."""
        return self._sums(*jax.tree.leaves(params)) if any(self._copies) else None

    def finish(self, step: int, sums: Array | None) -> None:
        """Compares what `start` gave after a step; waits for it.

        Raises:
          DivergedError: in all processes, for the first parameter whose copies differ.
        """
        if sums is None:
            return
        values = np.asarray(sums).reshape(len(self._devices), -1)
        for number, groups in enumerate(self._copies):
            for group in groups:
                found, counts = np.unique(values[group, number], return_counts=True)
                if len(found) == 1:
                    continue
                usual = found[np.argmax(counts)]
                odd = [str(self._devices[place]) for place in group if values[place, number] != usual]
                rest = [str(self._devices[place]) for place in group if values[place, number] == usual]
                raise DivergedError(
                    f"after step {step}, {self._names[number]} on {', '.join(odd)} is not what it is on "
                    f"{', '.join(rest)}, and it should be the same. A device or link is at fault: take the first out "
                    f"of service. The copies last agreed after step {self._good}: of the checkpoints, keep those up to "
                    "that step, move later ones away, and run the same command"
                )
        self._good = step


def _copies(leaf: jax.Array, devices: list[jax.Device]) -> list[list[int]]:
    """Groups of places that hold the same part of an array; parts that are held once are left out."""
    parts: dict[str, list[int]] = {}
    index = leaf.sharding.devices_indices_map(leaf.shape)
    for place, device in enumerate(devices):
        parts.setdefault(repr(index[device]), []).append(place)
    return [places for places in parts.values() if len(places) > 1]


def _sum_of_bits(x: Array) -> Array:
    return jnp.sum(jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32), dtype=jnp.uint32)
