"""Writing one level of a small stack [levels, ...] inside a scan over layers.

Derived automatically, its gradient passes over all levels in every layer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mindjax.ops.bits import from_bits, to_bits

Array = jax.Array


@jax.custom_vjp
def put_level(stack: Array, x: Array, level: Array) -> Array:
    """`stack` [levels, ...] with x [...] at `level`; as it is where the level is negative."""
    return _put(stack, x, level)


def _put_backward(level: Array, g: Array) -> tuple[Array, Array, np.ndarray]:
    return _put(g, jnp.zeros(g.shape[1:], g.dtype), level), _get(g, level), _no_gradient(level)


put_level.defvjp(lambda stack, x, level: (_put(stack, x, level), level), _put_backward)


def _put(stack: Array, x: Array, level: Array) -> Array:
    if not len(stack):
        return stack

    def put(stack: Array) -> Array:
        return from_bits(lax.dynamic_update_index_in_dim(to_bits(stack), to_bits(x), level, 0), stack.dtype)

    return lax.cond(level >= 0, put, lambda stack: stack, stack)


def _get(stack: Array, level: Array) -> Array:
    """A level, zeros where it is negative."""
    zeros = jnp.zeros(stack.shape[1:], stack.dtype)
    if not len(stack):
        return zeros

    def get(stack: Array) -> Array:
        return from_bits(lax.dynamic_index_in_dim(to_bits(stack), level, keepdims=False), stack.dtype)

    return lax.cond(level >= 0, get, lambda stack: zeros, stack)


def _no_gradient(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)
