"""Which mesh axis splits which logical axis. This table is the only place that knows."""

from __future__ import annotations

import difflib

from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The batch's axes are those of `sharding.layout.BATCH`. Expert devices share the dense work, so they split it too.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations. The tokens of a row stay in one piece on `tensor` outside of the layers.
    "batch": ("data", "fsdp", "expert"),
    "time": "sequence",
    # Images lie with the rows that read them, and within these on all devices alike: none idles over a row of text.
    "vision_batch": ("data", "fsdp", "expert", "stage", "sequence", "tensor"),
    # Weights over fsdp by the dimension that faces the residual stream: gathered for use, gradients scattered back.
    "embed": "fsdp",
    "vision_embed": "fsdp",
    "vision_merged": "fsdp",
    # Weights over tensor by the inner dimension: the first product needs no exchange, the second one sum. The vision
    # encoder has a device's images to itself, so it gathers these too.
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert_mlp": "tensor",
    "vocab": "tensor",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "expert": "expert",
    # A stage holds its layers.
    "layer": "stage",
    # Whole on every device: scanned over, or too small to gain.
    "vision_layer": None,
    "deepstack": None,
    "norm": None,
    "router": None,
    "patch": None,
    "vision_position": None,
    # Fewer key/value heads than tensor devices, see `Parallel.logical_axes`.
    "whole_kv_heads": None,
    # Layers that the stages do not divide evenly, or that pass in several rounds: split by another dimension, and sent
    # to their stages once a step.
    "spread_layer": None,
    "spread_embed": ("fsdp", "stage"),
}


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The layout of an array whose dimensions have these logical names (None: not split).

    Raises:
      ValueError: for a name that the table lacks, or two dimensions on one mesh axis.
    """
    entries: list[str | tuple[str, ...] | None] = []
    owner: dict[str, str] = {}
    for name in axes:
        if name is not None and name not in RULES:
            near = difflib.get_close_matches(name, RULES, 1)
            raise ValueError(f"no rule for logical axis {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        entry = None if name is None else RULES[name]
        for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
            if mesh_axis in owner:
                raise ValueError(f"dimensions {owner[mesh_axis]!r} and {name!r} of {axes} both map to {mesh_axis!r}")
            owner[mesh_axis] = str(name)
        entries.append(entry)
    return PartitionSpec(*entries)


def sharding_for(axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...] | None = None) -> NamedSharding:
    """The same on a mesh.

    Raises:
      ValueError: see `partition_spec`; with a `shape`, also for a dimension that does not divide.
    """
    sharding = NamedSharding(mesh, partition_spec(axes))
    if shape is not None:
        for name, size, entry in zip(axes, shape, sharding.spec, strict=True):
            parts = 1
            for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
                parts *= mesh.shape[mesh_axis]
            if size % parts:
                raise ValueError(f"{name!r} has size {size}, which mesh axis {entry!r} of size {parts} does not divide")
    return sharding
