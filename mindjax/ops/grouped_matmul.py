"""Products of consecutive groups of rows, each group with its own matrix: the experts of a mixture.

R rows, K inputs, N outputs, G groups. Three products make the op and its gradients: `gmm` (rows by matrices),
the same with the matrices transposed (gradient of the rows), and `tgmm` (gradient of the matrices).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mindjax.ops.bits import from_bits, to_bits
from mindjax.ops.matmul import contract, contract_rows

Array = jax.Array

IMPLEMENTATIONS = ("loop", "ragged_dot")


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


def grouped_matmul(lhs: Array, rhs: Array, group_sizes: Array, *, implementation: str | None = None) -> Array:
    """Multiplies each group of consecutive rows with its own matrix, accumulating in float32.

    Args:
      lhs: [R, K]; the first `group_sizes[0]` rows belong to group 0, the next to group 1, and so on.
      rhs: [G, K, N], of the dtype of `lhs`.
      group_sizes: [G] int32, each >= 0, their sum <= R.
      implementation: "loop" (over the groups that have rows, in tiles of rows) or "ragged_dot" (XLA's own, which
        expands densely on the CPU: 8 to 200 times the work); None takes the first on a CPU, else the second.

    Returns:
      [R, N] in the dtype of `lhs`. Rows past the last group are zero and pass no gradient, whatever they hold
      (NaN included); a group without rows has a zero gradient.

    Raises:
      ValueError: for shapes that do not fit, or an unknown implementation.
    """
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1] or group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            f"grouped_matmul takes lhs [R, K], rhs [G, K, N], group_sizes [G]; got {lhs.shape}, {rhs.shape}, "
            f"{group_sizes.shape}"
        )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS} or None, got {implementation!r}")
    return _grouped_matmul(lhs, rhs, group_sizes, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(lhs: Array, rhs: Array, group_sizes: Array, implementation: str | None) -> Array:
    return _gmm(lhs, rhs, group_sizes, False, implementation)


def _forward(
    lhs: Array, rhs: Array, group_sizes: Array, implementation: str | None
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _gmm(lhs, rhs, group_sizes, False, implementation), (lhs, rhs, group_sizes)


def _backward(
    implementation: str | None, saved: tuple[Array, Array, Array], g: Array
) -> tuple[Array, Array, np.ndarray]:
    lhs, rhs, group_sizes = saved
    dlhs = _gmm(g, rhs, group_sizes, True, implementation)
    drhs = _tgmm(lhs, g, group_sizes, implementation)
    return dlhs, drhs, np.zeros(group_sizes.shape, jax.dtypes.float0)


_grouped_matmul.defvjp(_forward, _backward)


def _gmm(lhs: Array, rhs: Array, group_sizes: Array, transposed: bool, implementation: str | None) -> Array:
    """[R, K] by [G, K, N], or by [G, N, K] transposed, gives [R, N]."""
    loop, ragged = partial(_gmm_loop, transposed=transposed), partial(_gmm_ragged, transposed=transposed)
    return _choose(loop, ragged, implementation, lhs, rhs, group_sizes)


def _tgmm(lhs: Array, g: Array, group_sizes: Array, implementation: str | None) -> Array:
    """[R, K] and [R, N], contracted over the rows of each group, give [G, K, N]."""
    return _choose(_tgmm_loop, _tgmm_ragged, implementation, lhs, g, group_sizes)


def _choose(
    loop: Callable[..., Array], ragged: Callable[..., Array], implementation: str | None, *operands: Array
) -> Array:
    if implementation is None:
        return lax.platform_dependent(*operands, cpu=loop, default=ragged)
    return (loop if implementation == "loop" else ragged)(*operands)


# ---- a loop over groups and tiles


def _tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: the power of two nearest to half a mean group, in 8 .. 256.

    Half a group wastes a quarter of the work on average; below 8 rows the cost of a loop step dominates, above 256
    the product runs at full speed.
    """
    return int(min(256, max(8, 2 ** round(np.log2(max(1.0, rows / groups / 2))))))


def _nonempty_groups(group_sizes: Array) -> tuple[Array, Array, Array, Array]:
    """(first row of each group, row after it, groups with those that have rows first, how many have rows)."""
    ends = jnp.cumsum(group_sizes)
    occupied = group_sizes > 0
    return ends - group_sizes, ends, jnp.argsort(~occupied, stable=True), jnp.sum(occupied)


def _gmm_loop(lhs: Array, rhs: Array, group_sizes: Array, *, transposed: bool) -> Array:
    rows, groups = lhs.shape[0], rhs.shape[0]
    columns = rhs.shape[1] if transposed else rhs.shape[2]
    tile = _tile_rows(rows, groups)
    starts, ends, order, occupied = _nonempty_groups(group_sizes)
    dtype = lhs.dtype
    lhs, rhs = to_bits(jnp.pad(lhs, ((0, tile), (0, 0)))), to_bits(rhs)

    def one_group(i: Array, out: Array) -> Array:
        group = order[i]
        matrix = from_bits(lax.dynamic_index_in_dim(rhs, group, keepdims=False), dtype)

        def one_tile(j: Array, out: Array) -> Array:
            first = starts[group] + j * tile
            block = from_bits(lax.dynamic_slice_in_dim(lhs, first, tile), dtype)
            product = contract(block, matrix, (1,), (1 if transposed else 0,)).astype(dtype)
            # Surplus rows of a group's last tile are the next group's, which overwrites them.
            return lax.dynamic_update_slice_in_dim(out, to_bits(product), first, axis=0)

        return lax.fori_loop(0, -(-group_sizes[group] // tile), one_tile, out)

    out = lax.fori_loop(0, occupied, one_group, to_bits(jnp.zeros((rows + tile, columns), dtype)))[:rows]
    return _zero_past(from_bits(out, dtype), ends[-1])


def _tgmm_loop(lhs: Array, g: Array, group_sizes: Array) -> Array:
    rows, groups = lhs.shape[0], group_sizes.shape[0]
    tile = _tile_rows(rows, groups)
    starts, ends, order, occupied = _nonempty_groups(group_sizes)
    dtype = lhs.dtype
    sides = [to_bits(jnp.pad(a, ((0, tile), (0, 0)))) for a in (lhs, g)]

    def one_group(i: Array, out: Array) -> Array:
        group = order[i]

        def one_tile(j: Array, total: Array) -> Array:
            first = starts[group] + j * tile
            inside = (first + jnp.arange(tile) < ends[group])[:, None]
            # Both sides: zero times NaN is NaN.
            blocks = (
                jnp.where(inside, lax.dynamic_slice_in_dim(a, first, tile), jnp.zeros((), a.dtype)) for a in sides
            )
            return total + contract_rows(*(from_bits(block, dtype) for block in blocks))

        total = jnp.zeros((lhs.shape[1], g.shape[1]), jnp.float32)
        total = lax.fori_loop(0, -(-group_sizes[group] // tile), one_tile, total)
        return lax.dynamic_update_index_in_dim(out, to_bits(total.astype(dtype)), group, axis=0)

    out = to_bits(jnp.zeros((groups, lhs.shape[1], g.shape[1]), dtype))
    return from_bits(lax.fori_loop(0, occupied, one_group, out), dtype)


def _zero_past(array: Array, end: Array) -> Array:
    return jnp.where((jnp.arange(array.shape[0]) < end)[:, None], array, jnp.zeros((), array.dtype))


# ---- XLA's ragged_dot


def _gmm_ragged(lhs: Array, rhs: Array, group_sizes: Array, *, transposed: bool) -> Array:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return _ragged_dot(lhs, rhs, group_sizes, numbers)


def _tgmm_ragged(lhs: Array, g: Array, group_sizes: Array) -> Array:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return _ragged_dot(lhs, _zero_past(g, jnp.sum(group_sizes)), group_sizes, numbers)


def _ragged_dot(lhs: Array, rhs: Array, group_sizes: Array, numbers: lax.RaggedDotDimensionNumbers) -> Array:
    end = jnp.sum(group_sizes)
    out = lax.ragged_dot_general(
        _zero_past(lhs, end), rhs, group_sizes, numbers,
        precision=lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    ).astype(lhs.dtype)  # fmt: skip
    return _zero_past(out, end) if out.ndim == 2 else out
