"""Grouped-query attention of the language model, with RMSNorm on each query and key head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mindjax.config import TextConfig
from mindjax.models.parameters import Init
from mindjax.ops.matmul import matmul
from mindjax.ops.norm import rms_norm
from mindjax.ops.rotary import rotate

# Given q [B, T, N, D] and k, v [B, T, K, D] of new tokens: what they attend to, and whatever state comes out of it.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class TextAttention(nnx.Module):
    """Projections stacked over layers."""

    def __init__(self, init: Init, config: TextConfig):
        layer, embed = ("layer", config.num_hidden_layers), ("embed", config.hidden_size)
        heads = ("heads", config.num_attention_heads * config.head_dim)
        kv_heads = ("kv_heads", config.num_key_value_heads * config.head_dim)
        self.q = init.normal(layer, embed, heads)
        self.k = init.normal(layer, embed, kv_heads)
        self.v = init.normal(layer, embed, kv_heads)
        self.o = init.normal(layer, heads, embed)
        self.q_norm = init.constant(1.0, layer, ("norm", config.head_dim))
        self.k_norm = init.constant(1.0, layer, ("norm", config.head_dim))


def text_attention(
    p: dict[str, Any], x: jax.Array, rope: tuple[jax.Array, jax.Array], config: TextConfig, attend: Attend
) -> tuple[jax.Array, Any]:
    """One layer's attention on x [B, T, H]; `attend` decides over which keys (a whole row, or a cache)."""
    lead = x.shape[:2]
    q = matmul(x, p["q"]).reshape(*lead, config.num_attention_heads, config.head_dim)
    k = matmul(x, p["k"]).reshape(*lead, config.num_key_value_heads, config.head_dim)
    v = matmul(x, p["v"]).reshape(*lead, config.num_key_value_heads, config.head_dim)
    q = rotate(rms_norm(q, p["q_norm"], config.rms_norm_eps), *rope)
    k = rotate(rms_norm(k, p["k_norm"], config.rms_norm_eps), *rope)
    out, state = attend(checkpoint_name(q, "qkv"), checkpoint_name(k, "qkv"), checkpoint_name(v, "qkv"))
    return matmul(out.reshape(*lead, -1), p["o"]), state
