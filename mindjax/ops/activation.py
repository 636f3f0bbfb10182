"""The activations of the two feed-forward blocks, with what multiplies or precedes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_cuda import jax_fused
from mindjax.ops.dispatch import on_cpu
from mindjax.ops.matmul import sum_rows

Array = jax.Array


@jax.custom_vjp
def silu_product(gate: Array, up: Array) -> Array:
    """silu(gate) * up, elementwise."""
    return on_cpu(jax_fused.silu_product, _silu_product, gate, up)


def _silu_product(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _silu_product_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    def default(gate: Array, up: Array, g: Array) -> tuple[Array, ...]:
        return jax.vjp(_silu_product, gate, up)[1](g)

    return on_cpu(jax_fused.silu_product_grad, default, *saved, g)


silu_product.defvjp(lambda gate, up: (silu_product(gate, up), (gate, up)), _silu_product_backward)


@jax.custom_vjp
def bias_gelu(x: Array, bias: Array) -> Array:
    """gelu(x + bias), approximated by tanh, on x [..., N] and bias [N]."""
    return on_cpu(jax_fused.bias_gelu, _bias_gelu, x, bias)


def _bias_gelu(x: Array, bias: Array) -> Array:
    return _gelu(x + jnp.expand_dims(bias, tuple(range(x.ndim - 1))))


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _bias_gelu_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, bias = saved

    def default(x: Array, bias: Array, g: Array) -> tuple[Array, Array]:
        (dx,) = jax.vjp(_gelu, x + jnp.expand_dims(bias, tuple(range(x.ndim - 1))))[1](g)
        return dx, sum_rows(dx)

    dx, d_bias = on_cpu(jax_fused.bias_gelu_grad, default, x, bias, g)
    return dx, d_bias.astype(bias.dtype)


bias_gelu.defvjp(lambda x, bias: (bias_gelu(x, bias), (x, bias)), _bias_gelu_backward)
