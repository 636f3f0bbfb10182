"""The activations of the two feed-forward blocks, with what multiplies or precedes them."""

from __future__ import annotations

from functools import partial

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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def bias_gelu(x: Array, bias: Array, approximate: bool = True) -> Array:
    """gelu(x + bias), approximated by tanh or exact, on x [..., N] and bias [N], in the dtype of the bias.

    The sum has that dtype too. x may be float32 all the same: a product that is rounded with its bias, not before.
    """
    if x.dtype not in (bias.dtype, jnp.float32):
        raise ValueError(f"bias_gelu takes x of the bias's dtype, {bias.dtype}, or float32, not {x.dtype}")
    kernel, default = partial(jax_fused.bias_gelu, exact=not approximate), partial(_bias_gelu, approximate=approximate)
    return on_cpu(kernel, lambda x, bias: default(x, bias)[0], x, bias)


def _bias_gelu(x: Array, bias: Array, approximate: bool) -> tuple[Array, Array]:
    total = (x + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))).astype(bias.dtype)
    return jax.nn.gelu(total, approximate=approximate), total


def _bias_gelu_forward(x: Array, bias: Array, approximate: bool) -> tuple[Array, tuple[Array, Array | None]]:
    if x.dtype == bias.dtype:
        return bias_gelu(x, bias, approximate), (x, bias)
    kernel = partial(jax_fused.bias_gelu_and_sum, exact=not approximate)
    out, total = on_cpu(kernel, partial(_bias_gelu, approximate=approximate), x, bias)
    return out, (total, None)


def _bias_gelu_backward(approximate: bool, saved: tuple[Array, Array | None], g: Array) -> tuple[Array, Array]:
    x, bias = saved
    wide = bias is None
    if bias is None:
        bias = jnp.zeros(x.shape[-1], x.dtype)

    def default(x: Array, bias: Array, g: Array) -> tuple[Array, Array]:
        total = x + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))
        (dx,) = jax.vjp(partial(jax.nn.gelu, approximate=approximate), total)[1](g)
        return dx, sum_rows(dx)

    dx, d_bias = on_cpu(partial(jax_fused.bias_gelu_grad, exact=not approximate), default, x, bias, g)
    return dx.astype(jnp.float32) if wide else dx, d_bias.astype(bias.dtype)


bias_gelu.defvjp(_bias_gelu_forward, _bias_gelu_backward)
