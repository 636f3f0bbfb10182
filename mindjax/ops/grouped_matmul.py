"""Products of consecutive groups of rows, each with its own matrix: the experts of a mixture.

R rows, K inputs, N outputs, G groups.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def grouped_matmul_reference(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    """The definition, one masked product per group; G times the work. See `grouped_matmul`."""
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    row = jnp.arange(lhs.shape[0])

    def add_group(out: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        start, end, matrix = group
        rows = jnp.where(((row >= start) & (row < end))[:, None], lhs, jnp.zeros((), lhs.dtype))
        return out + jnp.matmul(rows, matrix, preferred_element_type=jnp.float32), None

    out = jnp.zeros((lhs.shape[0], rhs.shape[2]), jnp.float32)
    return lax.scan(add_group, out, (starts, ends, rhs))[0].astype(lhs.dtype)


def grouped_matmul(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    """Multiplies each group of consecutive rows with its own matrix, accumulating in float32.

    Args:
      lhs: [R, K]; the first `group_sizes[0]` rows belong to group 0, the next to group 1, and so on.
      rhs: [G, K, N], of the dtype of `lhs`.
      group_sizes: [G] int32, each >= 0, their sum <= R.

    Returns:
      [R, N] in the dtype of `lhs`. Rows past the last group are zero and pass no gradient, whatever they hold
      (NaN included); a group without rows has a zero gradient.
    """
    return grouped_matmul_reference(lhs, rhs, group_sizes)
