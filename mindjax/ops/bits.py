"""Two-byte floats as integers, where an array is sliced or updated in a loop.

XLA's CPU backend has no bfloat16 slice or update: it converts the whole array to float32 and back around each one,
which turns a loop over a stack into work quadratic in its length. The same bits as integers are sliced as they are.
On other backends both functions cost nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def to_bits(x: Array) -> Array:
    """A two-byte float as uint16 of the same shape; anything else as it is. Not differentiable."""
    two_byte_float = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return lax.bitcast_convert_type(x, jnp.uint16) if two_byte_float else x


def from_bits(x: Array, dtype: Any) -> Array:
    """The inverse of `to_bits`, given the dtype that went in."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
