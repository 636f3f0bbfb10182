"""The dense product of the model, accumulated in float32 in both directions, or with a weight of 8 bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_cuda import jax_binding, jax_fused
from mindjax.ops.dispatch import on_cpu, on_cpu_and_cuda
from mindjax.ops.layer import Layer
from mindjax.ops.quantize import ACTIVATIONS, Quantized, quantize, quantized_matmul

Array = jax.Array

FEW_ROWS = 64  # of int8, for which the CPU's kernel is made


def matmul(x: Array, w: Array | Quantized | Layer, *, dtype: Any = None) -> Array:
    """`x @ w` with float32 accumulation in the product and in both gradients.

    Args:
      x: [..., K].
      w: [K, N], of the dtype of `x`; or that out of a stack, without gradients; or quantised, [N, K] with K last: then
        the rows of x are quantised too, and the product is `quantized_matmul`, without gradients.
      dtype: of the result; that of `x` by default. With float32 the accumulator is returned unrounded.

    Returns:
      [..., N].

    JAX alone accumulates the gradients of a bfloat16 product in bfloat16, and XLA's CPU backend runs a bfloat16
    product without a float32 result at half speed.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if isinstance(w, Quantized) or (isinstance(w, Layer) and isinstance(w.stack, Quantized)):
        return _quantized(x, w, dtype)
    return _of_layer(x, w, dtype) if isinstance(w, Layer) else _matmul(x, w, dtype)


def _of_layer(x: Array, w: Layer, dtype: jnp.dtype) -> Array:
    def kernel(x: Array, w: Layer) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        return jax_binding.gmm(rows, *w.groups(_one_group(rows)), dtype=dtype).reshape(*x.shape[:-1], -1)

    return on_cpu(kernel, lambda x, w: _matmul(x, w.slice(), dtype), x, w)


def _quantized(x: Array, w: Quantized | Layer, dtype: jnp.dtype) -> Array:
    format = (w.stack if isinstance(w, Layer) else w).format
    rows = quantize(x.reshape(-1, x.shape[-1]), ACTIVATIONS[format])

    def kernel(rows: Quantized, w: Quantized | Layer) -> Array:
        size = _one_group(rows.values)
        matrix, size = w.groups(size) if isinstance(w, Layer) else (jax.tree.map(lambda leaf: leaf[None], w), size)
        if rows.values.dtype == jnp.int8:
            scales = rows.scales[:, 0], matrix.scales[..., 0]
            return jax_binding.gmm_s8(rows.values, scales[0], matrix.values, scales[1], size, dtype=dtype)
        return jax_binding.gmm_fp8(rows.values, rows.scales, matrix.values, matrix.scales, size, dtype=dtype)

    def product(rows: Quantized, w: Quantized | Layer) -> Array:
        return quantized_matmul(rows, w.slice() if isinstance(w, Layer) else w, dtype=dtype)

    if rows.values.dtype != jnp.int8:
        out = on_cpu_and_cuda(kernel, product, rows, w)
    elif rows.values.shape[0] <= FEW_ROWS and jax_binding.multiplies_few_int8():
        out = on_cpu(kernel, product, rows, w)
    else:  # XLA's own product is the faster one on CPUs
        out = product(rows, w)
    return out.reshape(*x.shape[:-1], -1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Array, w: Array, dtype: jnp.dtype) -> Array:
    def kernel(x: Array, w: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        return jax_binding.gmm(rows, w[None], _one_group(rows), dtype=dtype).reshape(*x.shape[:-1], -1)

    return on_cpu(kernel, lambda x, w: contract(x, w, (x.ndim - 1,), (0,)).astype(dtype), x, w)


def _forward(x: Array, w: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, w, dtype), (x, w)


def _backward(dtype: jnp.dtype, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    # A float32 cotangent of bfloat16 operands is rounded like the operands are: the sums stay in float32.
    return on_cpu(_kernel_backward, _contract_backward, x, w, g.astype(x.dtype))


def _contract_backward(x: Array, w: Array, g: Array) -> tuple[Array, Array]:
    return contract(g, w, (g.ndim - 1,), (1,)).astype(x.dtype), contract_rows(x, g).astype(w.dtype)


def _kernel_backward(x: Array, w: Array, g: Array) -> tuple[Array, Array]:
    """The dense product is the grouped one with a single group."""
    rows, outer = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    size = _one_group(rows)
    return jax_binding.gmm_t(outer, w[None], size).reshape(x.shape), jax_binding.tgmm(rows, outer, size)[0]


@jax.custom_vjp
def linear(x: Array, w: Array, bias: Array) -> Array:
    """`x @ w + bias` on x [..., K], w [K, N], bias [N] of one dtype.

    The bias joins the float32 sum: added to a rounded one, it would cost bfloat16 a third more error.
    """

    def default(x: Array, w: Array, bias: Array) -> Array:
        total = contract(x, w, (x.ndim - 1,), (0,)) + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))
        return total.astype(x.dtype)

    return on_cpu(jax_fused.linear, default, x, w, bias.astype(jnp.float32))


def _linear_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    return *_backward(g.dtype, saved, g), sum_rows(g).astype(g.dtype)


linear.defvjp(lambda x, w, bias: (linear(x, w, bias), (x, w)), _linear_backward)


def matmul_transposed(x: Array, w: Array, *, dtype: Any = None) -> Array:
    """`x @ w.T` for x [..., K] and w [N, K], as `matmul` otherwise; w is read where it lies.

    For a tied output head: in a loop XLA would write the transposed table anew in every step.
    """
    return _matmul_t(x, w, jnp.dtype(dtype or x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul_t(x: Array, w: Array, dtype: jnp.dtype) -> Array:
    def kernel(x: Array, w: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        return jax_binding.gmm_t(rows, w[None], _one_group(rows), dtype=dtype).reshape(*x.shape[:-1], -1)

    return on_cpu(kernel, lambda x, w: contract(x, w, (x.ndim - 1,), (1,)).astype(dtype), x, w)


def _backward_t(dtype: jnp.dtype, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    g = g.astype(x.dtype)
    # The transposed g by x: what the gradient of w is in g @ w for a cotangent x.
    return matmul(g, w), _backward(dtype, (g, w), x)[1]


def _one_group(rows: Array) -> Array:
    return jnp.full(1, rows.shape[0], jnp.int32)


_matmul.defvjp(_forward, _backward)
_matmul_t.defvjp(lambda x, w, dtype: (_matmul_t(x, w, dtype), (x, w)), _backward_t)


def contract(a: Array, b: Array, a_dims: tuple[int, ...], b_dims: tuple[int, ...]) -> Array:
    """Contracts dimensions of `a` with dimensions of `b`; the float32 accumulator is the result."""
    # Asking for float32 means wanting float32: without HIGHEST a TPU would round float32 operands to bfloat16
    # and a GPU to TF32, and parity with a float32 reference would be lost. bfloat16 operands are exact either way.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, ((a_dims, b_dims), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def contract_rows(a: Array, b: Array) -> Array:
    """[..., K] and [..., N], contracted over all rows, give [K, N] in float32: the gradient of a weight.

    XLA's CPU backend has its fast bfloat16 kernel (and its faster float32 one) only where the left side is
    contracted over its last dimension. It transposes a left side to get there when *two* dimensions are contracted,
    not when one is, so a single dimension of rows is split: 2 to 2.5 times the speed in bfloat16, 1.2 in float32.
    """
    if sum(size > 1 for size in a.shape[:-1]) == 1:
        rows = a.size // a.shape[-1]
        if rows % 2 == 0:
            a, b = (x.reshape(2, rows // 2, x.shape[-1]) for x in (a, b))
    rows_dims = tuple(range(a.ndim - 1))
    return contract(a, b, rows_dims, rows_dims)


def sum_rows(x: Array) -> Array:
    """[..., N] summed over all but the last dimension, in float32."""

    def default(x: Array) -> Array:
        # As a product with ones: XLA's CPU backend turns a sum over rows that it fuses with what makes them into a
        # scalar reduce-window, up to 50 times slower.
        rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        return contract(jnp.ones(rows.shape[0], jnp.float32), rows, (0,), (0,))

    return on_cpu(jax_fused.sum_rows, default, x)
