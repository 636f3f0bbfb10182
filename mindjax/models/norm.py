"""Normalisation. Statistics are float32 whatever the input: a mean of squares loses too much in bf16."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mindjax.models.parameters import Init
from mindjax.ops.matmul import add_bias, sum_rows

# The vision encoder's epsilon is fixed by the published code, not by config.json.
LAYER_NORM_EPS = 1e-6


class LayerNorm(nnx.Module):
    """Scale and bias; `lead` holds stacked leading dimensions."""

    def __init__(self, init: Init, size: int, lead: tuple[tuple[str, int], ...] = ()):
        self.scale = init.constant(1.0, *lead, ("norm", size))
        self.bias = init.constant(0.0, *lead, ("norm", size))


@jax.custom_vjp
def _scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
    """`y * scale` on y [..., H] and scale [H]; the gradient of the scale is summed in float32 by `sum_rows`."""
    return y * _expand(scale, y)


def _scaled_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, scale = saved
    return g * _expand(scale, g), sum_rows(g.astype(jnp.float32) * y.astype(jnp.float32)).astype(scale.dtype)


_scaled.defvjp(lambda y, scale: (_scaled(y, scale), (y, scale)), _scaled_backward)


def layer_norm(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """LayerNorm over the last dimension of x [..., H]."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    y = add_bias(_scaled(y, p["scale"].astype(y.dtype)), p["bias"].astype(y.dtype))
    return y.astype(x.dtype)


def rms_norm(scale: jax.Array, x: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last dimension of x [..., H]; the scale is applied after the cast back, as published."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)
    return _scaled(y.astype(x.dtype), scale)


def _expand(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector, tuple(range(like.ndim - 1)))
