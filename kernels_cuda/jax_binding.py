"""The kernels as JAX functions, for every platform whose library is there. No autodiff: see `mindjax.ops`.

R rows, K inputs, N outputs, G groups; layouts are those of include/launch.h. `group_sizes` is int32 on the device and
may be longer than G: group g then has `group_sizes[group_offset + g]` rows, and the rows of the others come out zero.
Each function raises XlaRuntimeError, naming the shapes, where operands do not fit.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_cuda import library

Array = jax.Array

PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}  # backend -> XLA's name of the platform
TARGETS = (
    *("gmm", "gmm_t", "tgmm", "gmm_fp8", "gmm_s8"),
    *("quantize_e4m3", "permute", "unpermute", "swiglu", "swiglu_grad"),
)
# In the CUDA library alone: the same products by CUTLASS.
VARIANTS = ("gmm_cutlass", "gmm_t_cutlass", "tgmm_cutlass")


@functools.cache
def available(backend: str) -> bool:
    """Whether the library of "cpu" or "cuda" is there; the first call registers what it holds with XLA."""
    handle = library.load(backend).handle
    if handle is None or not hasattr(handle, "mjk_ffi_gmm"):
        return False
    for name in (*TARGETS, *VARIANTS):
        symbol = getattr(handle, f"mjk_ffi_{name}", None)
        if symbol is not None:
            jax.ffi.register_ffi_target(f"mjk_{name}", jax.ffi.pycapsule(symbol), platform=PLATFORMS[backend])
    return True


@functools.cache
def multiplies_few_int8() -> bool:
    """Whether the CPU's library has instructions for int8 products of few rows, and so a kernel."""
    handle = library.load("cpu").handle
    return handle is not None and available("cpu") and handle.mjk_isa() == b"amx_bf16"


def _call(name: str, results: Any, *operands: Array, aliases: dict[int, int] | None = None, **attributes: int) -> Any:
    for backend in PLATFORMS:
        available(backend)
    # The FFI has no batched form: vmap runs the calls one after the other.
    call = jax.ffi.ffi_call(f"mjk_{name}", results, vmap_method="sequential", input_output_aliases=aliases)
    return call(*operands, **{key: np.int64(value) for key, value in attributes.items()})


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _nothing(dtype: Any) -> Array:
    """An operand that is not given."""
    return jnp.zeros((0,), dtype)


def gmm(x: Array, w: Array, group_sizes: Array, *, group_offset: int = 0, dtype: Any = None, by: str = "") -> Array:
    """x [R, K] by w [G, K, N], each group of rows by its own matrix: [R, N] in `dtype` (default: that of x).

    x and w are both float32 or both bfloat16; sums are float32. `by="cutlass"` takes the cross-check (CUDA alone).
    """
    out = _array((x.shape[0], w.shape[2]), dtype or x.dtype)
    return _call(f"gmm{by and '_' + by}", out, x, w, group_sizes, group_offset=group_offset)


def gmm_t(g: Array, w: Array, group_sizes: Array, *, group_offset: int = 0, dtype: Any = None, by: str = "") -> Array:
    """g [R, N] by the transposed w [G, K, N]: [R, K], the gradient of `gmm`'s rows."""
    out = _array((g.shape[0], w.shape[1]), dtype or g.dtype)
    return _call(f"gmm_t{by and '_' + by}", out, g, w, group_sizes, group_offset=group_offset)


def tgmm(
    x: Array, g: Array, group_sizes: Array, *, groups: int | None = None, group_offset: int = 0, dtype: Any = None,
    into: Array | None = None, by: str = "",
) -> Array:  # fmt: skip
    """x [R, K] transposed by g [R, N] over the rows of each group: [G, K, N], the gradient of `gmm`'s matrices.

    `groups` defaults to all of `group_sizes`. `into` [G, K, N] float32 is added to (in place where XLA may).
    """
    groups = group_sizes.shape[0] if groups is None else groups
    dtype = jnp.float32 if into is not None else dtype or x.dtype
    operands = (x, g, group_sizes, _nothing(jnp.float32) if into is None else into)
    out = _array((groups, x.shape[1], g.shape[1]), dtype)
    aliases = None if into is None else {3: 0}
    return _call(f"tgmm{by and '_' + by}", out, *operands, aliases=aliases, group_offset=group_offset)


def gmm_fp8(
    x: Array, x_scale: Array, w: Array, w_scale: Array, group_sizes: Array, *, group_offset: int = 0,
    dtype: Any = jnp.bfloat16,
) -> Array:  # fmt: skip
    """x [R, K] e4m3 with scales [R, ceil(K/128)] by w [G, N, K] e4m3 with [G, ceil(N/128), ceil(K/128)]: [R, N].

    The sum over each 128 of K is float32 before its scales are applied.
    """
    out = _array((x.shape[0], w.shape[1]), dtype)
    return _call("gmm_fp8", out, x, x_scale, w, w_scale, group_sizes, group_offset=group_offset)


def gmm_s8(
    x: Array, x_scale: Array, w: Array, w_scale: Array, group_sizes: Array, *, group_offset: int = 0,
    dtype: Any = jnp.bfloat16,
) -> Array:  # fmt: skip
    """x [R, K] int8 with scales [R] by w [G, N, K] int8 with scales [G, N]: [R, N]; the sum is an int32."""
    out = _array((x.shape[0], w.shape[1]), dtype)
    return _call("gmm_s8", out, x, x_scale, w, w_scale, group_sizes, group_offset=group_offset)


def quantize_e4m3(x: Array, index: Array | None = None) -> tuple[Array, Array]:
    """Rows `index` (default: all) of x [R, K] as e4m3 [., K] and float32 scales [., ceil(K/128)] per 1 x 128.

    The scale is max |x| / 448, 1 for a block of zeros; the value x / scale, clipped, rounded to nearest even. A
    negative index gives zeros with scale 1.
    """
    rows = x.shape[0] if index is None else index.shape[0]
    results = (_array((rows, x.shape[1]), jnp.float8_e4m3fn), _array((rows, -(-x.shape[1] // 128)), jnp.float32))
    return _call("quantize_e4m3", results, x, _nothing(jnp.int32) if index is None else index)


def permute(x: Array, index: Array) -> Array:
    """Rows `index` [M] int32 of x [R, K]: [M, K]; zeros where the index is negative."""
    return _call("permute", _array((index.shape[0], x.shape[1]), x.dtype), x, index)


def unpermute(x: Array, index: Array, weight: Array | None = None) -> Array:
    """The sum over j of weight [T, C] float32 (default: 1) times row index [T, C] int32 of x [R, K]: [T, K].

    Summed in float32 in the order of j; a negative index adds nothing.
    """
    operands = (x, index, _nothing(jnp.float32) if weight is None else weight)
    return _call("unpermute", _array((index.shape[0], x.shape[1]), x.dtype), *operands)


def swiglu(gate_up: Array, scale: Array | None = None) -> Array:
    """silu(gate) times up of gate_up [R, 2 I] (gate first), times scale [R] float32 where given: [R, I]."""
    out = _array((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)
    return _call("swiglu", out, gate_up, _nothing(jnp.float32) if scale is None else scale)


def swiglu_grad(gate_up: Array, d_out: Array, scale: Array | None = None) -> tuple[Array, Array]:
    """Gradients of `swiglu` for d_out [R, I]: of gate_up [R, 2 I], and of scale [R] (no elements where not given)."""
    operands = (gate_up, _nothing(jnp.float32) if scale is None else scale, d_out)
    results = (_array(gate_up.shape, gate_up.dtype), _array(operands[1].shape, jnp.float32))
    return _call("swiglu_grad", results, *operands)
