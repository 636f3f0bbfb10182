"""Normalisation. Statistics are float32 whatever the input: a mean of squares loses too much in bf16."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mindjax.models.parameters import Init

# The vision encoder's epsilon is fixed by the published code, not by config.json.
LAYER_NORM_EPS = 1e-6


class LayerNorm(nnx.Module):
    """Scale and bias; `lead` holds stacked leading dimensions."""

    def __init__(self, init: Init, size: int, lead: tuple[tuple[str, int], ...] = ()):
        self.scale = init.constant(1.0, *lead, ("norm", size))
        self.bias = init.constant(0.0, *lead, ("norm", size))


def layer_norm(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """LayerNorm over the last dimension of x [..., H]."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    y = y * _expand(p["scale"], y) + _expand(p["bias"], y)
    return y.astype(x.dtype)


def rms_norm(scale: jax.Array, x: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last dimension of x [..., H]; the scale is applied after the cast back, as published."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)
    return y.astype(x.dtype) * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


def _expand(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector.astype(like.dtype), tuple(range(like.ndim - 1)))
