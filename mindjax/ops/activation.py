"""The activations of the two feed-forward blocks, with what multiplies or precedes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_cuda import jax_binding, jax_fused
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
def swiglu(gate_up: Array, scale: Array) -> Array:
    """silu(gate) * up * scale of gate_up [R, 2 I] (gate first) and scale [R] float32, as experts have it: [R, I]."""
    return on_cpu(jax_binding.swiglu, _swiglu, gate_up, scale)


def _swiglu(gate_up: Array, scale: Array) -> Array:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up * scale[:, None].astype(gate_up.dtype)


def _swiglu_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    def kernel(gate_up: Array, scale: Array, g: Array) -> tuple[Array, Array]:
        return jax_binding.swiglu_grad(gate_up, g, scale)

    def default(gate_up: Array, scale: Array, g: Array) -> tuple[Array, Array]:
        return jax.vjp(_swiglu, gate_up, scale)[1](g)

    return on_cpu(kernel, default, *saved, g)


swiglu.defvjp(lambda gate_up, scale: (swiglu(gate_up, scale), (gate_up, scale)), _swiglu_backward)


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
