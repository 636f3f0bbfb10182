"""Scaled dot-product attention inside segments, with grouped key/value heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from kernels_cuda import jax_fused
from mindjax.ops import pallas_attention
from mindjax.ops.dispatch import on_cpu

# Queries beyond this go in blocks, so that memory grows with T x block, not T^2.
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
    # Chosen here and not when the program is compiled: the kernel brings its own backward pass.
    if jax.default_backend() == "tpu" and pallas_attention.fits(q, k):
        return pallas_attention.attention(q, k, v, q_segment_ids, kv_segment_ids, causal=causal)
    length = q.shape[1]
    index = jnp.arange(length, dtype=jnp.int32) if causal else jnp.full(length, -1, jnp.int32)
    return _attention(q, k, v, q_segment_ids, kv_segment_ids, index)


@jax.custom_vjp
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, q_segment_ids: jax.Array, kv_segment_ids: jax.Array, q_index: jax.Array
) -> jax.Array:
    return _forward(q, k, v, q_segment_ids, kv_segment_ids, q_index)[0]


# The backward pass is written out: it recomputes the weights from one number per query and takes the softmax's inner
# product over D instead of over S. Derived automatically, the weights would be kept for every layer, and filling,
# storing and reading that stack costs more on a CPU than the products.
def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, q_segment_ids: jax.Array, kv_segment_ids: jax.Array, q_index: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    operands = (q, k, v, q_segment_ids, kv_segment_ids, q_index)
    out, normaliser = attend(*operands)
    out, normaliser = checkpoint_name(out, "attention"), checkpoint_name(normaliser, "attention")
    return out, (*operands, out, normaliser)


def _backward(saved: tuple[jax.Array, ...], g: jax.Array) -> tuple[Any, ...]:
    nothing = [np.zeros(ids.shape, jax.dtypes.float0) for ids in saved[3:6]]
    return (*attend_grad(*(*saved, g)), *nothing)


_attention.defvjp(_forward, _backward)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, q_segment_ids: jax.Array, kv_segment_ids: jax.Array, q_index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The forward pass of `attention` with the normaliser, from which parts over different keys can be joined.

    Args:
      q, k, v, q_segment_ids, kv_segment_ids: see `attention`.
      q_index: [T] int32, the last key that each query sees, below 0 where it sees all.

    Returns:
      (out, logarithm of each query's sum of exponentials [B, N, T] float32, infinite where a query sees nothing).
    """
    if not _in_blocks(q):
        return on_cpu(jax_fused.attention, _attend_whole, q, k, v, q_segment_ids, kv_segment_ids, q_index)

    def block(args: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, segments, index = args
        return on_cpu(jax_fused.attention, _attend_whole, q, k, v, segments, kv_segment_ids, index)

    out, normaliser = jax.lax.map(block, (_split(q, 1), _split(q_segment_ids, 1), _split(q_index, 0)))
    return _join(out, 1), _join(normaliser, 2)


def attend_grad(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    q_index: jax.Array,
    out: jax.Array,
    normaliser: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v.

    Args:
      q, k, v, q_segment_ids, kv_segment_ids, q_index: see `attend`.
      out, normaliser: over all keys that the queries see, of which these may be some.
      g: the gradient of `out`.
    """
    call = partial(on_cpu, jax_fused.attention_grad, _attend_whole_backward)
    if not _in_blocks(q):
        return call(q, k, v, q_segment_ids, kv_segment_ids, q_index, out, normaliser, g)

    def block(sums: tuple[jax.Array, jax.Array], args: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        q, segments, index, out, normaliser, g = args
        dq, dk, dv = call(q, k, v, segments, kv_segment_ids, index, out, normaliser, g)
        return (sums[0] + dk.astype(jnp.float32), sums[1] + dv.astype(jnp.float32)), dq

    parts = (
        _split(q, 1), _split(q_segment_ids, 1), _split(q_index, 0), _split(out, 1), _split(normaliser, 2), _split(g, 1)
    )  # fmt: skip
    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(block, zeros, parts)
    return _join(dq, 1), dk.astype(k.dtype), dv.astype(v.dtype)


def _in_blocks(q: jax.Array) -> bool:
    return q.shape[1] > QUERY_BLOCK and q.shape[1] % QUERY_BLOCK == 0


def _split(x: jax.Array, dim: int) -> jax.Array:
    """The dimension of queries in blocks, which come first."""
    return jnp.moveaxis(x.reshape(*x.shape[:dim], -1, QUERY_BLOCK, *x.shape[dim + 1 :]), dim, 0)


def _join(x: jax.Array, dim: int) -> jax.Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def _attend_whole(
    q: jax.Array, k: jax.Array, v: jax.Array, q_segment_ids: jax.Array, kv_segment_ids: jax.Array, q_index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(out, logarithm of each query's sum of exponentials [B, N, T])."""
    rows, keys, values = _fold(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = _scores(rows, keys, q_segment_ids, kv_segment_ids, q_index)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    out = _product("bkns,bksd->bknd", (weights / total).astype(v.dtype), values)
    # Rows of padding, which attend to nothing, get weights of 0 in the backward pass.
    normaliser = jnp.where(largest > MASKED / 2, largest + jnp.log(total), jnp.float32(jnp.inf))
    return _unfold(out, q.shape).astype(q.dtype), normaliser.reshape(q.shape[0], q.shape[2], q.shape[1])


def _attend_whole_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    q_index: jax.Array,
    out: jax.Array,
    normaliser: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    heads = k.shape[2]
    normaliser = normaliser.reshape(q.shape[0], heads, -1, 1)
    rows, keys, values = _fold(q, heads), k.swapaxes(1, 2), v.swapaxes(1, 2)
    weights = jnp.exp(_scores(rows, keys, q_segment_ids, kv_segment_ids, q_index) - normaliser)
    inner = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    g_rows = _fold(g, heads)
    d_weights = _product("bknd,bksd->bkns", g_rows, values)
    d_scores = (weights * (d_weights - _fold(inner, heads)) * jnp.float32(q.shape[-1] ** -0.5)).astype(q.dtype)
    dq = _product("bkns,bksd->bknd", d_scores, keys)
    dk, dv = _over_rows(d_scores, rows), _over_rows(weights.astype(v.dtype), g_rows)
    dk, dv = dk.swapaxes(1, 2).astype(k.dtype), dv.swapaxes(1, 2).astype(v.dtype)
    return _unfold(dq, q.shape).astype(q.dtype), dk, dv


def _scores(
    rows: jax.Array, keys: jax.Array, q_segment_ids: jax.Array, kv_segment_ids: jax.Array, q_index: jax.Array
) -> jax.Array:
    """Masked scores, [B, K, G x T, S] float32."""
    batch, kv_heads, folded, dim = rows.shape
    length, size = q_index.shape[0], keys.shape[2]
    allowed = (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]) & (kv_segment_ids != 0)[:, None, :]
    ahead = (q_index[:, None] < jnp.arange(size, dtype=jnp.int32)[None, :]) & (q_index >= 0)[:, None]
    allowed = (allowed & ~ahead[None])[:, None, None]
    scores = _product("bknd,bksd->bkns", rows, keys) * jnp.float32(dim**-0.5)
    scores = scores.reshape(batch, kv_heads, folded // length, length, size)
    # Added, not selected: a sum with -1e30 is -1e30, and the addend is the same in all layers, so it is made once.
    scores = scores + jnp.where(allowed, jnp.float32(0), jnp.float32(MASKED))
    return scores.reshape(batch, kv_heads, folded, size)


def _fold(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, D] to [B, K, G x T, D]: the queries of one key/value head in one matrix."""
    batch, length, heads, dim = x.shape
    x = x.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    return x.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)


def _unfold(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_fold`."""
    batch, length, heads, dim = shape
    kv_heads = x.shape[1]
    return x.reshape(batch, kv_heads, heads // kv_heads, length, dim).transpose(0, 3, 1, 2, 4).reshape(shape)


def _over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """[B, K, n, S] and [B, K, n, D], contracted over n, give [B, K, S, D] float32."""
    if a.shape[2] % 2 == 0:  # two contracted dimensions reach XLA's fast CPU kernel, see `matmul.contract_rows`
        a, b = (x.reshape(*x.shape[:2], 2, x.shape[2] // 2, x.shape[3]) for x in (a, b))
        return _product("bkhns,bkhnd->bksd", a, b)
    return _product("bkns,bknd->bksd", a, b)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # HIGHEST: float32 operands stay float32 on TPU and GPU too, for the reason given in `matmul.contract`.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)
