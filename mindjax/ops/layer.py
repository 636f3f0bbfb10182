"""A matrix out of a stack over layers that a product reads where it lies.

A loop over layers that slices its weights writes each slice before the product reads it. With the rows of training that
is little; a decoding step, which reads every weight once for a few rows, takes twice the memory traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mindjax.ops.bits import from_bits, to_bits
from mindjax.ops.quantize import Quantized

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """Takes the place of a weight in `matmul` and `grouped_matmul`, without gradients.

    Attributes:
      stack: [L, ...], or a quantised [L, N, K].
      number: scalar int32, which of them.
    """

    stack: Any
    number: Array

    def slice(self) -> Any:
        """[...], a copy."""

        def one(leaf: Array) -> Array:
            return from_bits(lax.dynamic_index_in_dim(to_bits(leaf), self.number, keepdims=False), leaf.dtype)

        return jax.tree.map(one, self.stack)

    def groups(self, sizes: Array) -> tuple[Any, Array]:
        """(matrices [L x G, K, N] of all layers, [L x G] `sizes` [G] for those of this one and 0 for the others)."""
        matrices = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), self.stack)
        empty = jnp.zeros(jax.tree.leaves(matrices)[0].shape[0], jnp.int32)
        return matrices, lax.dynamic_update_slice_in_dim(empty, sizes, self.number * sizes.shape[0], axis=0)


def in_place(layers: Any) -> tuple[Any, Callable[[Any, Array], Any]]:
    """Divides a tree of stacks for a loop over layers.

    Returns:
      (what to slice: norms, and matrices of 8 bits that no product reads in place; a function of its slices and the
      layer's number that gives the layer's whole tree, with a `Layer` for every other matrix).
    """
    leaves, tree = jax.tree.flatten(layers, is_leaf=lambda node: isinstance(node, Quantized))
    sliced = [None if _is_read(leaf) else leaf for leaf in leaves]

    def layer(slices: Any, number: Array) -> Any:
        pairs = zip(leaves, slices, strict=True)
        return jax.tree.unflatten(tree, [Layer(leaf, number) if here is None else here for leaf, here in pairs])

    return sliced, layer


def _is_read(leaf: Array | Quantized) -> bool:
    if isinstance(leaf, Quantized):
        return leaf.values.dtype == jnp.int8 and leaf.values.ndim == 3
    return leaf.ndim >= 3
