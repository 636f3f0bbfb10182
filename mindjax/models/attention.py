"""Grouped-query attention of the language model, with RMSNorm on each query and key head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mindjax.config import TextConfig
from mindjax.models.parameters import Init
from mindjax.ops.attention import attend, attend_grad, attention
from mindjax.ops.matmul import matmul
from mindjax.ops.norm import rms_norm
from mindjax.ops.rotary import rotate
from sharding.links import ONE_DEVICE, Links
from sharding.sequence import ring, ulysses

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


def row_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, links: Links) -> jax.Array:
    """Causal attention inside the segments of packed rows, of which this device may have a part of the tokens.

    Args:
      q: [B, T, N, D].
      k, v: [B, T, K, D].
      segment_ids: [B, T].
    """

    def whole(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return attention(q, k, v, q_segment_ids=segments, kv_segment_ids=segments, causal=True)

    devices = links.layout.sequence
    if devices == 1:
        return whole(q, k, v, segment_ids)
    if links.layout.context == "ring":
        return ring(attend, attend_grad, "sequence", devices, q, k, v, segment_ids)
    return ulysses(whole, q, k, v, segment_ids, axis="sequence", devices=devices)


def text_attention(
    p: dict[str, Any],
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    config: TextConfig,
    attend_to: Attend,
    links: Links = ONE_DEVICE,
) -> tuple[jax.Array, Any]:
    """One layer's attention on x [B, T, H]; `attend_to` decides over which keys (a whole row, or a cache).

    With the heads split over devices, each has its own, and the results are summands.
    """
    heads = (*x.shape[:2], -1, config.head_dim)
    q = matmul(x, p["q"]).reshape(heads)
    k = matmul(x, links.own_heads(p["k"], config.num_key_value_heads)).reshape(heads)
    v = matmul(x, links.own_heads(p["v"], config.num_key_value_heads)).reshape(heads)
    q = rotate(rms_norm(q, p["q_norm"], config.rms_norm_eps), *rope)
    k = rotate(rms_norm(k, p["k_norm"], config.rms_norm_eps), *rope)
    out, state = attend_to(checkpoint_name(q, "qkv"), checkpoint_name(k, "qkv"), checkpoint_name(v, "qkv"))
    return matmul(out.reshape(*x.shape[:2], -1), p["o"]), state
