"""A layout on real devices: where parameters and batches lie, and how a function of local parts becomes one of arrays.

The whole forward pass runs inside one `jax.shard_map` over all axes: which bytes move, and when, is what the model says
through `sharding.links`, not what a partitioner finds. Losses, optimizer and whatever is small stay outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.layout import Layout
from sharding.links import Links
from sharding.rules import partition_spec, sharding_for

Array = jax.Array


@dataclass(frozen=True)
class Parallel:
    """Devices in a layout; static under jit.

    Attributes:
      layout: sizes of the axes.
      mesh: the devices.
    """

    layout: Layout
    mesh: Mesh

    @classmethod
    def of(cls, layout: Layout, devices: Sequence[jax.Device] | None = None) -> Parallel | None:
        """None for one device, which needs none of this.

        Raises:
          ValueError: the layout takes another number of devices than there are.
        """
        if layout.devices == 1 and jax.process_count() == 1:
            return None
        return cls(layout, layout.mesh(devices))

    @property
    def links(self) -> Links:
        return Links(self.layout)

    # ---- parameters

    def logical_axes(self, axes: Any, *, layers: int, kv_heads: int) -> Any:
        """The logical axes of parameters with what this layout changes about them.

        Args:
          axes: a tree of tuples of names.
          layers: of the language model.
          kv_heads: of an attention layer.
        """
        uneven = self.layout.stage > 1 and (layers % self.layout.stage > 0 or self.layout.pipeline_rounds > 1)
        changes = {"layer": "spread_layer", "embed": "spread_embed"} if uneven else {}

        def one(names: tuple[str, ...]) -> tuple[str, ...]:
            if "layer" in names:
                names = tuple(changes.get(name, name) for name in names)
            if kv_heads % self.layout.tensor:
                names = tuple("whole_kv_heads" if name == "kv_heads" else name for name in names)
            return names

        return jax.tree.map(one, axes, is_leaf=lambda node: isinstance(node, tuple))

    def shardings(self, axes: Any) -> Any:
        """`NamedSharding`s for a tree of tuples of logical names."""
        return jax.tree.map(lambda names: sharding_for(names, self.mesh), axes, is_leaf=_is_names)

    def by_stage(self, layers: Any, axes: Any) -> tuple[Any, Any]:
        """Stacked layers [L, ...] as the stages hold them: [stage, round, layers of a round, ...], zeros past the last.

        Layer `(round * stages + stage) * size + i` is entry [stage, round, i].

        Args:
          layers: a tree of leaves [L, ...].
          axes: their logical axes.

        Returns:
          (leaves, their specs). Layers of zeros add nothing to the residual stream, and their gradient is dropped.
        """
        stages, rounds = self.layout.stage, self.layout.pipeline_rounds

        def spec(names: tuple[str, ...]) -> PartitionSpec:
            return PartitionSpec("stage", None, None, *partition_spec(_settled(names))[1:])

        def one(leaf: Array, names: tuple[str, ...]) -> Array:
            count = leaf.shape[0]
            size = -(-count // (stages * rounds))
            padding = [(0, stages * rounds * size - count)] + [(0, 0)] * (leaf.ndim - 1)
            leaf = jnp.pad(leaf, padding).reshape(rounds, stages, size, *leaf.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec(names)))

        return jax.tree.map(one, layers, axes), jax.tree.map(spec, axes, is_leaf=_is_names)

    def from_stages(self, values: Array, layers: int) -> Array:
        """[stage, round, size, ...] back to [L, ...]."""
        return values.swapaxes(0, 1).reshape(-1, *values.shape[3:])[:layers]

    # ---- functions

    def spmd(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` of the local parts of its arguments as a function of the whole arrays.

        Outputs whose spec leaves out an axis must be equal along it; gradients flow through the collectives as the
        gradient of the sum over all devices, which is what they are.
        """
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False,
            axis_names=set(self.mesh.axis_names),
        )  # fmt: skip


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple)


def _settled(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a layer's weights once its stage holds them."""
    return tuple({"spread_layer": "layer", "spread_embed": "embed"}.get(name, name) for name in names)
