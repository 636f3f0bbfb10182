"""Scaled dot-product attention inside segments, with grouped key/value heads."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

# Queries beyond this go in blocks, recomputed in the backward pass, so that memory grows with T x block, not T^2.
QUERY_BLOCK = 1024
# Finite, so that a row of padding (nothing to attend to) gives an average and not NaN.
MASKED = -1e30


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    causal: bool,
) -> jax.Array:
    """Attends to keys of the same segment; segment 0 is padding and is never attended to.

    Args:
      q: [B, T, N, D].
      k, v: [B, S, K, D], K divides N; head n reads key/value head n // (N / K).
      q_segment_ids: [B, T] int32.
      kv_segment_ids: [B, S] int32.
      causal: whether query t sees keys s <= t only (then T == S).

    Returns:
      [B, T, N, D] in q's dtype; scores and softmax are float32.
    """
    length = q.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    if length <= QUERY_BLOCK or length % QUERY_BLOCK:
        return _attend(q, k, v, q_segment_ids, kv_segment_ids, index, causal)

    def block(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_block, segments, rows = args
        return _attend(q_block, k, v, segments, kv_segment_ids, rows, causal)

    blocks = length // QUERY_BLOCK
    split = jnp.moveaxis(q.reshape(q.shape[0], blocks, QUERY_BLOCK, *q.shape[2:]), 1, 0)
    segments = jnp.moveaxis(q_segment_ids.reshape(-1, blocks, QUERY_BLOCK), 1, 0)
    out = jax.lax.map(jax.checkpoint(block), (split, segments, index.reshape(blocks, QUERY_BLOCK)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    q_index: jax.Array,
    causal: bool,
) -> jax.Array:
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    allowed = (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]) & (kv_segment_ids != 0)[:, None, :]
    if causal:
        allowed &= (q_index[:, None] >= jnp.arange(k.shape[1], dtype=jnp.int32)[None, :])[None]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    # HIGHEST: float32 operands stay float32 on TPU and GPU too, for the reason given in `matmul.contract`.
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    product = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores = product("btkgd,bskd->bkgts", grouped, k) * dim**-0.5
    scores = jnp.where(allowed[:, None, None], scores, jnp.float32(MASKED))
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = product("bkgts,bskd->btkgd", weights, v)
    return out.reshape(batch, length, heads, dim).astype(q.dtype)
