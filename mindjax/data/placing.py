"""From what each process assembled to global arrays: every device gets its rows, and no process needs all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindjax.data.packing import BatchShape
from sharding.layout import BATCH
from sharding.parallel import Parallel


def shards_of_process(mesh: Mesh | None) -> list[int]:
    """The batch shards of which this process has a device, in order; None is one device."""
    if mesh is None:
        return [0]
    local = np.vectorize(lambda device: device.process_index == jax.process_index(), otypes=[bool])(mesh.devices)
    others = tuple(axis for axis, name in enumerate(mesh.axis_names) if name not in BATCH)
    # What is left are the axes of BATCH, in the mesh's order, which is theirs.
    return [int(shard) for shard in np.flatnonzero(local.any(axis=others))]


def global_batch(parts: Mapping[int, Any], shards: int, mesh: Mesh | None, merge_size: int) -> Any:
    """One tree of global arrays from the shards of a step; works with one process and with several.

    Args:
      parts: {shard: tree}, at least those of `shards_of_process`; leaves [micro_batches, rows, ...] of equal shapes.
        Batches in the tree number their images, pairs and responses over all shards afterwards (their `shifted`).
      shards: of the whole batch.
      mesh: of all processes; None is one device.
      merge_size: side of the square of patches that becomes one token.

    Returns:
      The tree with leaves [micro_batches, shards * rows, ...], the rows over the batch axes of the mesh, whole along
      the others. On one device: what was given, in host memory still.

    Raises:
      ValueError: the mesh has another number of batch shards, or a shard that this process needs is missing.
    """
    split = 1 if mesh is None else math.prod(mesh.shape[name] for name in BATCH)
    if split != shards:
        raise ValueError(f"{shards} shards for a mesh that splits the batch in {split}")
    if missing := sorted(set(shards_of_process(mesh)) - set(parts)):
        raise ValueError(f"this process has devices of batch shards {missing} and loaded shards {sorted(parts)}")
    if mesh is None or mesh.size == 1:
        return parts[0]
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH))
    numbers = list(parts)
    shifted = [_shifted(parts[number], number, merge_size) for number in numbers]

    def place(*leaves: Any) -> jax.Array:
        micro_batches, rows, *rest = leaves[0].shape
        of = dict(zip(numbers, leaves, strict=True))

        def shard(index: Any) -> Any:
            return of[(index[1].start or 0) // rows]

        return jax.make_array_from_callback((micro_batches, shards * rows, *rest), sharding, shard)

    return jax.tree.map(place, *shifted)


def placement(parallel: Parallel | None, shape: BatchShape) -> Callable[[Mapping[int, Any]], Any]:
    """What makes a batch from the parts that a loader gives, see `global_batch`."""
    if parallel is None:
        return partial(global_batch, shards=1, mesh=None, merge_size=shape.merge_size)
    shards = parallel.layout.batch_shards
    return partial(global_batch, shards=shards, mesh=parallel.mesh, merge_size=shape.merge_size)


def _shifted(part: Any, shard: int, merge_size: int) -> Any:
    def is_batch(node: Any) -> bool:
        return hasattr(node, "shifted")

    return jax.tree.map(
        lambda node: node.shifted(shard, merge_size) if is_batch(node) else node, part, is_leaf=is_batch
    )
