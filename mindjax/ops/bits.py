"""Floats of one and two bytes as integers, where an array is sliced or updated in a loop.

XLA's CPU backend has no bfloat16 slice or update: it converts the whole array to float32 and back around each one,
which turns a loop over a stack into work quadratic in its length; float8 becomes float16, which takes twice the memory.
The same bits as integers are sliced as they are.
On other backends it costs nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def to_bits(x: Array) -> Array:
    """A small float as an unsigned integer of the same shape; anything else as it is. Not differentiable."""
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") if is_small(x.dtype) else x


def is_small(dtype: Any) -> bool:
    """Whether it is a float of one or two bytes."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize <= 2


def from_bits(x: Array, dtype: Any) -> Array:
    """The inverse of `to_bits`, given the dtype that went in."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def split(x: Array, parts: int) -> list[Array]:
    """`jnp.split(x, parts, axis=-1)`, whose gradient is one concatenation."""
    return [from_bits(part, x.dtype) for part in jnp.split(to_bits(x), parts, axis=-1)]


def _split_gradient(parts: int, _: None, gradients: list[Array]) -> tuple[Array]:
    bits = jnp.concatenate([to_bits(gradient) for gradient in gradients], axis=-1)
    return (from_bits(bits, gradients[0].dtype),)


split.defvjp(lambda x, parts: (split(x, parts), None), _split_gradient)
