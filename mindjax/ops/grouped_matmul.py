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

from kernels_cuda import jax_binding, library
from mindjax.ops.bits import from_bits, to_bits
from mindjax.ops.dispatch import on_cpu, on_cpu_and_cuda
from mindjax.ops.layer import Layer
from mindjax.ops.matmul import contract, contract_rows
from mindjax.ops.quantize import ACTIVATIONS, Quantized, dequantize, quantize

Array = jax.Array

IMPLEMENTATIONS = ("auto", "reference", "loop", "ragged_dot", "cpu", "cuda", "cutlass", "pallas")


def grouped_matmul_reference(x: Array, w: Array, group_sizes: Array) -> Array:
    """The definition, one masked product per group; G times the work. See `grouped_matmul`."""
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    row = jnp.arange(x.shape[0])

    def add_group(out: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        start, end, matrix = group
        rows = jnp.where(((row >= start) & (row < end))[:, None], x, jnp.zeros((), x.dtype))
        return out + contract(rows, matrix, (1,), (0,)), None

    out = jnp.zeros((x.shape[0], w.shape[2]), jnp.float32)
    return _zero_past(lax.scan(add_group, out, (starts, ends, w))[0].astype(x.dtype), ends[-1])


def grouped_matmul(
    x: Array, w: Array | Quantized | Layer, group_sizes: Array, *, implementation: str = "auto"
) -> Array:
    """Multiplies each group of consecutive rows with its own matrix, accumulating in float32.

    Args:
      x: [R, K]; the first `group_sizes[0]` rows belong to group 0, the next to group 1, and so on.
      w: [G, K, N], of the dtype of `x`, float32 or bfloat16; or those out of a stack, without gradients; or quantised,
        [G, N, K] with K last: then the rows of x are quantised too, and there are no gradients.
      group_sizes: [G] int32, each >= 0, their sum <= R.
      implementation: "auto" takes the best path of the platform that the computation runs on: the library of
        `kernels_cuda` on CPU and CUDA where it is built, Pallas on TPU, else "loop" on CPU and "ragged_dot" elsewhere.
        Or one of them by name: "cpu", "cuda", "cutlass" (an independent check of "cuda"), "pallas", "loop" (jnp, over
        the groups that have rows, in tiles of rows), "ragged_dot" (XLA's own, which expands densely on the CPU: 8 to
        200 times the work), "reference" (the definition, differentiated by JAX).

    Returns:
      [R, N] in the dtype of `x`. Rows past the last group are zero and pass no gradient, whatever they hold
      (NaN included); a group without rows has a zero gradient.

    Raises:
      ValueError: for shapes or dtypes that do not fit, an unknown implementation, or one whose library is missing.
    """
    if isinstance(w, Quantized):
        return _quantized(x, w, group_sizes)
    if isinstance(w, Layer):
        return _of_layer(x, w, group_sizes)
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"grouped_matmul takes x [R, K], w [G, K, N], group_sizes [G]; got {x.shape}, {w.shape}, "
            f"{group_sizes.shape}"
        )
    if x.dtype != w.dtype or x.dtype not in (jnp.float32, jnp.bfloat16) or group_sizes.dtype != jnp.int32:
        raise ValueError(
            "grouped_matmul takes x and w of one dtype, float32 or bfloat16, and int32 group_sizes; got "
            f"{x.dtype}, {w.dtype}, {group_sizes.dtype}"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    backend = {"cpu": "cpu", "cuda": "cuda", "cutlass": "cuda"}.get(implementation)
    if backend and not jax_binding.available(backend):
        raise ValueError(f"implementation {implementation!r}: {library.load(backend).problem}")
    if implementation == "reference":
        return grouped_matmul_reference(x, w, group_sizes)
    return _grouped_matmul(x, w, group_sizes, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x: Array, w: Array, group_sizes: Array, implementation: str) -> Array:
    return _gmm(x, w, group_sizes, False, implementation)


def _forward(x: Array, w: Array, group_sizes: Array, implementation: str) -> tuple[Array, tuple[Array, Array, Array]]:
    return _gmm(x, w, group_sizes, False, implementation), (x, w, group_sizes)


def _backward(implementation: str, saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, np.ndarray]:
    x, w, group_sizes = saved
    dx = _gmm(g, w, group_sizes, True, implementation)
    dw = _tgmm(x, g, group_sizes, implementation)
    return dx, dw, np.zeros(group_sizes.shape, jax.dtypes.float0)


_grouped_matmul.defvjp(_forward, _backward)


def _of_layer(x: Array, w: Layer, group_sizes: Array) -> Array:
    return on_cpu(
        lambda x, w, group_sizes: jax_binding.gmm(x, *w.groups(group_sizes)),
        lambda x, w, group_sizes: _gmm(x, w.slice(), group_sizes, False, "auto"),
        x, w, group_sizes,
    )  # fmt: skip


def _quantized(x: Array, w: Quantized, group_sizes: Array) -> Array:
    """The arithmetic of `mindjax.ops.quantize.quantized_matmul`, by kernels; elsewhere the same numbers multiplied out
    in float32, which rounds int8 sums that the kernels have exactly."""
    rows = quantize(x, ACTIVATIONS[w.format])
    integers = w.values.dtype == jnp.int8

    def kernel(rows: Quantized, w: Quantized, group_sizes: Array) -> Array:
        call = jax_binding.gmm_s8 if integers else jax_binding.gmm_fp8
        scales = [q.scales[..., 0] if integers else q.scales for q in (rows, w)]
        return call(rows.values, scales[0], w.values, scales[1], group_sizes, dtype=x.dtype)

    def emulation(rows: Quantized, w: Quantized, group_sizes: Array) -> Array:
        matrices = dequantize(w).swapaxes(-1, -2)
        return _gmm(dequantize(rows), matrices, group_sizes, False, "auto").astype(x.dtype)

    return on_cpu_and_cuda(kernel, emulation, rows, w, group_sizes)


def _gmm(x: Array, w: Array, group_sizes: Array, transposed: bool, implementation: str) -> Array:
    """[R, K] by [G, K, N], or by [G, N, K] transposed, gives [R, N]."""
    call = jax_binding.gmm_t if transposed else jax_binding.gmm
    paths: dict[str, Callable[..., Array]] = {
        "loop": partial(_gmm_loop, transposed=transposed),
        "ragged_dot": partial(_gmm_ragged, transposed=transposed),
        "pallas": partial(_pallas("gmm"), transposed=transposed),
        "library": call,
        "cutlass": partial(call, by="cutlass"),
    }
    return _choose(paths, implementation, x, w, group_sizes)


def _tgmm(x: Array, g: Array, group_sizes: Array, implementation: str) -> Array:
    """[R, K] and [R, N], contracted over the rows of each group, give [G, K, N]."""
    paths: dict[str, Callable[..., Array]] = {
        "loop": _tgmm_loop,
        "ragged_dot": _tgmm_ragged,
        "pallas": _pallas("tgmm"),
        "library": jax_binding.tgmm,
        "cutlass": partial(jax_binding.tgmm, by="cutlass"),
    }
    return _choose(paths, implementation, x, g, group_sizes)


def _pallas(product: str) -> Callable[..., Array]:
    def call(*operands: Array, **options: bool) -> Array:
        from mindjax.ops import pallas_grouped_matmul  # Pallas takes a second to import, and only a TPU needs it

        return getattr(pallas_grouped_matmul, product)(*operands, **options)

    return call


def _choose(paths: dict[str, Callable[..., Array]], implementation: str, *operands: Array) -> Array:
    if implementation != "auto":
        return paths["library" if implementation in ("cpu", "cuda") else implementation](*operands)

    # Neither the library, Pallas nor ragged_dot has a batched form.
    @jax.custom_batching.sequential_vmap
    def call(*operands: Array) -> Array:
        return lax.platform_dependent(
            *operands,
            cpu=paths["library" if jax_binding.available("cpu") else "loop"],
            cuda=paths["library" if jax_binding.available("cuda") else "ragged_dot"],
            tpu=paths["pallas"],
            default=paths["ragged_dot"],
        )

    return call(*operands)


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
