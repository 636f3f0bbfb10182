"""RMSNorm and LayerNorm. Statistics are float32 whatever the input: a mean of squares loses too much in bf16.

The backward passes recompute the normalised values from the input, which costs less than keeping them.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from kernels_cuda import jax_fused
from mindjax.ops.dispatch import on_cpu
from mindjax.ops.matmul import sum_rows

Array = jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """RMSNorm over the last dimension of x [..., H]; the scale [H] is applied after the cast back, as published."""
    return on_cpu(partial(jax_fused.rms_norm, eps=eps), partial(_rms_norm, eps=eps), x, scale)


def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return _normalised(x.astype(jnp.float32), eps)[0].astype(x.dtype) * _expand(scale, x)


def _rms_norm_backward(eps: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, scale = saved

    def default(x: Array, scale: Array, g: Array) -> tuple[Array, Array]:
        y, inverse = _normalised(x.astype(jnp.float32), eps)
        outer = g.astype(jnp.float32)
        inner = outer * _expand(scale.astype(jnp.float32), x)
        dx = (inner - y * (inner * y).mean(-1, keepdims=True)) * inverse
        return dx.astype(x.dtype), sum_rows(outer * y.astype(x.dtype).astype(jnp.float32))

    dx, d_scale = on_cpu(partial(jax_fused.rms_norm_grad, eps=eps), default, x, scale, g)
    return dx, d_scale.astype(scale.dtype)


rms_norm.defvjp(lambda x, scale, eps: (rms_norm(x, scale, eps), (x, scale)), _rms_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """LayerNorm over the last dimension of x [..., H] with scale and bias [H]."""
    return on_cpu(partial(jax_fused.layer_norm, eps=eps), partial(_layer_norm, eps=eps), x, scale, bias)


def _layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    y, _ = _normalised(_centred(x), eps)
    return (y * _expand(scale.astype(y.dtype), y) + _expand(bias.astype(y.dtype), y)).astype(x.dtype)


def _layer_norm_backward(eps: float, saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, scale, bias = saved

    def default(x: Array, scale: Array, g: Array) -> tuple[Array, Array, Array]:
        y, inverse = _normalised(_centred(x), eps)
        outer = g.astype(jnp.float32)
        inner = outer * _expand(scale.astype(jnp.float32), x)
        dx = inner - inner.mean(-1, keepdims=True) - y * (inner * y).mean(-1, keepdims=True)
        return (dx * inverse).astype(x.dtype), sum_rows(outer * y), sum_rows(outer)

    dx, d_scale, d_bias = on_cpu(partial(jax_fused.layer_norm_grad, eps=eps), default, x, scale, g)
    return dx, d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


layer_norm.defvjp(lambda x, scale, bias, eps: (layer_norm(x, scale, bias, eps), (x, scale, bias)), _layer_norm_backward)


def _centred(x: Array) -> Array:
    y = x.astype(jnp.float32)
    return y - y.mean(-1, keepdims=True)


def _normalised(y: Array, eps: float) -> tuple[Array, Array]:
    """(y / rms(y), 1 / rms(y)), the latter [..., 1]."""
    inverse = jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)
    return y * inverse, inverse


def _expand(vector: Array, like: Array) -> Array:
    return jnp.expand_dims(vector, tuple(range(like.ndim - 1)))
