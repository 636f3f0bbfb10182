"""Grouped products on TPU by megablox, the Pallas kernel that comes with JAX; elsewhere the same kernel interpreted.

R rows, K inputs, N outputs, G groups. Sizes stay on the device. Of the kernel's contract this adds: rows past the
last group come out as zeros whatever they hold, any R, K and N, float32 inputs multiplied as float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# The package exports a function under this module's name.
_megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

# VMEM for one step's tiles, both copies of each. A kernel may use 16 MiB on v5p; what is left holds the products'
# temporaries.
_TILE_BYTES = 8 * 2**20


def gmm(x: Array, w: Array, sizes: Array, *, transposed: bool) -> Array:
    """Each group of rows by its own matrix, accumulated in float32.

    Args:
      x: [R, K]; [R, N] where transposed. bfloat16 or float32.
      w: [G, K, N], of x's dtype.
      sizes: [G] int32, rows of each group, consecutive; their sum <= R.
      transposed: multiply by each matrix transposed.

    Returns:
      [R, N] ([R, K] where transposed) in x's dtype; zeros past the last group.
    """
    run = partial(_gmm, transposed=transposed)
    return lax.platform_dependent(x, w, sizes, tpu=partial(run, interpret=False), default=partial(run, interpret=True))


def tgmm(x: Array, g: Array, sizes: Array) -> Array:
    """The gradient of the matrices: [R, K] and [R, N] contracted over each group's rows, in float32.

    Returns:
      [G, K, N] in x's dtype; zeros for a group without rows. Rows past the last group do not count.
    """
    return lax.platform_dependent(
        x, g, sizes, tpu=partial(_tgmm, interpret=False), default=partial(_tgmm, interpret=True)
    )


def _gmm(x: Array, w: Array, sizes: Array, *, transposed: bool, interpret: bool) -> Array:
    rows, inputs, outputs = x.shape[0], x.shape[1], w.shape[1 if transposed else 2]
    tile_rows = _tile_rows(rows, len(sizes), x.dtype)
    # All inputs in one tile where they fit: a group's weights then stay in VMEM from one tile of rows to the next, and
    # are read once. Wide outputs come next: x is read once for each tile of outputs.
    tile_inputs = _fit(inputs, _TILE_BYTES // (2 * x.dtype.itemsize * (tile_rows + 256)))
    left = _TILE_BYTES - 2 * x.dtype.itemsize * tile_rows * tile_inputs
    tile_outputs = _fit(outputs, left // (2 * x.dtype.itemsize * (tile_inputs + tile_rows) + 4 * tile_rows))
    with _settings(x.dtype):
        out = _megablox.gmm(
            _pad_rows(x, tile_rows), w, sizes, preferred_element_type=x.dtype,
            tiling=(tile_rows, tile_inputs, tile_outputs), transpose_rhs=transposed, interpret=interpret,
        )[:rows]  # fmt: skip
    inside = jnp.arange(rows, dtype=jnp.int32) < jnp.sum(sizes)
    return jnp.where(inside[:, None], out, jnp.zeros((), out.dtype))


def _tgmm(x: Array, g: Array, sizes: Array, *, interpret: bool) -> Array:
    rows, inputs, outputs = x.shape[0], x.shape[1], g.shape[1]
    tile_rows = _tile_rows(rows, len(sizes), x.dtype)
    # Square tiles read least: x is read once for each tile of outputs, g for each of inputs. 512 x 512 in float32 with
    # two copies of the result fit beside the masked and transposed operands.
    tile_inputs, tile_outputs = _fit(inputs, 512), _fit(outputs, 512)
    with _settings(x.dtype):
        return _megablox.tgmm(
            _pad_rows(x, tile_rows).T, _pad_rows(g, tile_rows), sizes, preferred_element_type=x.dtype,
            tiling=(tile_rows, tile_inputs, tile_outputs), interpret=interpret,
        )  # fmt: skip


@contextmanager
def _settings(dtype: Any) -> Iterator[None]:
    """The kernel's products take their precision from the context; bfloat16 has no other than the default.

    Its own code promotes dtypes, whatever the caller's mode.
    """
    precision = jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")
    with precision, jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _tile_rows(rows: int, groups: int, dtype: Any) -> int:
    """A quarter of a mean group, as a power of two in 128 .. 512.

    Every group ends inside a tile on average, so that a tile of a quarter adds a quarter of the work; below 128 rows
    the matrix unit takes longer to load its weights than to use them. Fewer rows than that make one tile.
    """
    least = 32 // dtype.itemsize  # rows in one register
    quarter = rows // (4 * groups)
    tile = 512 if quarter >= 512 else 256 if quarter >= 256 else 128
    return min(tile, max(1, -(-rows // least)) * least)


def _fit(size: int, limit: int) -> int:
    """All of `size` where it is within the limit, else the multiple of 128 that makes the fewest, even parts."""
    if size <= limit:
        return size
    parts = -(-size // max(128, limit // 128 * 128))
    return -(-size // (128 * parts)) * 128


def _pad_rows(x: Array, tile: int) -> Array:
    """To a multiple of `tile` rows, and at least one."""
    rows = max(1, -(-x.shape[0] // tile)) * tile
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
