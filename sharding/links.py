"""The collectives that a model calls where a device holds a part of what it works on.

Everything here runs inside one `jax.shard_map` over all mesh axes (`sharding.parallel`). On one device every function
gives back what it got, so that a model is written once.

B rows, T tokens of a row, H hidden size; t the tokens that a device keeps between the matrices of a layer:
T / (sequence x tensor).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from sharding.layout import BATCH, Layout
from sharding.rules import RULES
from sharding.sequence import zigzag

Array = jax.Array


@dataclass(frozen=True)
class Links:
    """What connects this device to the others of its mesh.

    Attributes:
      layout: sizes of the axes.
      split_tokens: whether the tokens of a row are split over `tensor` too between the matrices of a layer: norms and
        sums are then done once, not by every device. A decoder with one new token a row cannot.
    """

    layout: Layout
    split_tokens: bool = True

    def index(self, axis: str) -> Array | int:
        """The place of this device on a mesh axis."""
        return lax.axis_index(axis) if getattr(self.layout, axis) > 1 else 0

    def gather(self, x: Array, axes: tuple[str, ...], dim: int) -> Array:
        """The parts of all devices along mesh axes, joined along a dimension; the first axis varies slowest."""
        axes = tuple(axis for axis in axes if getattr(self.layout, axis) > 1)
        return lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x

    def sum(self, x: Any, axes: tuple[str, ...]) -> Any:
        """The sum over the devices along mesh axes, on each of them."""
        axes = tuple(axis for axis in axes if getattr(self.layout, axis) > 1)
        return lax.psum(x, axes) if axes else x

    def scatter_sum(self, x: Array, axis: str, dim: int) -> Array:
        """This device's part along a dimension of the sum over a mesh axis."""
        if getattr(self.layout, axis) == 1:
            return x
        return lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)

    def largest(self, x: Array, axis: str) -> Array:
        """The largest over the devices along a mesh axis, on each of them."""
        return lax.pmax(x, axis) if getattr(self.layout, axis) > 1 else x

    def part(self, x: Array, axis: str, dim: int) -> Array:
        """This device's part along a dimension of what all devices on a mesh axis hold."""
        count = getattr(self.layout, axis)
        if count == 1:
            return x
        size = x.shape[dim] // count
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size, dim)

    # ---- weights

    def weights(self, p: Any, axes: Any, over: tuple[str, ...] = ("fsdp",)) -> Any:
        """Weights as a layer uses them: joined along the mesh axes `over`.

        Args:
          p: a tree of local parts.
          axes: the same tree with logical axis names; leading ones, of dimensions that have been indexed away, are
            left out. Not read where no device has a part.
          over: mesh axes.
        """

        def one(leaf: Array, names: tuple[str, ...]) -> Array:
            for dim, name in enumerate(names[len(names) - leaf.ndim :]):
                entry = RULES[name]
                entries = (entry,) if isinstance(entry, str) else entry or ()
                leaf = self.gather(leaf, tuple(axis for axis in entries if axis in over), dim)
            return leaf

        if all(getattr(self.layout, axis) == 1 for axis in over):
            return p
        joined = jax.tree.map(one, p, axes)
        # Named, so that no policy of recompute keeps whole weights: they are gathered again for the backward pass.
        return jax.tree.map(lambda leaf: checkpoint_name(leaf, "weights"), joined)

    def own_heads(self, w: Array, heads: int) -> Array:
        """Of a key or value projection [..., heads x D], the columns of the heads that this device's queries read.

        Where there are fewer heads than devices on `tensor`, all of them lie on each device, which takes the one it
        needs.

        Args:
          heads: of the whole model.
        """
        if heads % self.layout.tensor == 0:
            return w
        width = w.shape[-1] // heads
        start = lax.axis_index("tensor") * heads // self.layout.tensor * width
        return lax.dynamic_slice_in_dim(w, start, width, w.ndim - 1)

    # ---- tokens between and inside the matrices of a layer

    def all_tokens(self, x: Array) -> Array:
        """[B, t, ...] to [B, T / sequence, ...], what the matrices of a layer take."""
        return self.gather(x, ("tensor",), 1) if self.split_tokens else x

    def sum_tokens(self, x: Array) -> Array:
        """[B, T / sequence, ...], of which every device on `tensor` has one summand, to the sum [B, t, ...]."""
        return self.scatter_sum(x, "tensor", 1) if self.split_tokens else self.sum(x, ("tensor",))

    def own_tokens(self, x: Array) -> Array:
        """[B, T / sequence, ...], the same on all of `tensor`, to [B, t, ...]."""
        return self.part(x, "tensor", 1) if self.split_tokens else x

    def whole_rows(self, x: Array) -> Array:
        """[B, T / sequence, ...] to [B, T, ...] in the order of the row."""
        x = self.gather(x, ("sequence",), 1)
        if self.layout.sequence > 1 and self.layout.context == "ring":
            x = x[:, np.argsort(zigzag(x.shape[1], self.layout.sequence))]
        return x

    def row_places(self, length: int) -> Array | None:
        """[T / sequence] int32, where in the row this device's tokens stand, None where it has all of them."""
        devices = self.layout.sequence
        if devices == 1:
            return None
        ring = self.layout.context == "ring"
        places = zigzag(length * devices, devices) if ring else np.arange(length * devices, dtype=np.int32)
        return jnp.asarray(places.reshape(devices, length))[lax.axis_index("sequence")]

    def sum_batch(self, x: Any) -> Any:
        """The sum over all rows and all their tokens."""
        return self.sum(x, (*BATCH, "sequence"))

    # ---- the head, which all stages share: each takes a part of the tokens that leave the last one

    def head_tokens(self, x: Array) -> Array:
        """[B, t, H], zero but on the last stage, to [B, T / sequence / stage, H]."""
        return self.all_tokens(self.scatter_sum(x, "stage", 1))

    def head_targets(self, x: Array) -> Array:
        """[B, T / sequence], the same on all stages, to those of `head_tokens`."""
        if self.layout.stage == 1:
            return x
        parts = x.reshape(x.shape[0], self._tensor_parts, self.layout.stage, -1)
        return self.part(parts, "stage", 2).reshape(x.shape[0], -1)

    def from_head(self, x: Array) -> Array:
        """The inverse of `head_targets`: [B, T / sequence / stage] to [B, T / sequence] on all stages."""
        parts = x.reshape(x.shape[0], self._tensor_parts, 1, -1)
        return self.gather(parts, ("stage",), 2).reshape(x.shape[0], -1)

    @property
    def _tensor_parts(self) -> int:
        return self.layout.tensor if self.split_tokens else 1


ONE_DEVICE = Links(Layout())
