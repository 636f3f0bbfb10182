"""Supervised fine-tuning: the negative log-likelihood of the target tokens."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from mindjax.types import Array, LossOutput


def sft_loss(
    logp: Array, mask: Array, *, segment_ids: Array | None = None, average: Literal["token", "sample"] = "token"
) -> LossOutput:
    """Negative log-likelihood over targets.

    Args:
      logp: [B, T] log-probabilities of the tokens.
      mask: [B, T] 1 for targets. What `logp` holds elsewhere has no influence, NaN included.
      segment_ids: [B, T] int, the conversation a token belongs to, numbered within the row, 0 for padding; needed
        for "sample".
      average: "token" counts every target alike, so long answers weigh more; "sample" first averages over the
        targets of a conversation, so that each conversation with a target weighs alike.

    Returns:
      The sum and what it is to be divided by: targets, or conversations with a target.
    """
    targets = mask > 0
    # where, not a product: 0 x NaN is NaN, and the padding may hold anything.
    nll = jnp.where(targets, -logp.astype(jnp.float32), 0.0)
    count = targets.astype(jnp.float32)
    if average == "token":
        return LossOutput(jnp.sum(nll), jnp.sum(count))
    if average != "sample":
        raise ValueError(f"average must be 'token' or 'sample', not {average!r}")
    if segment_ids is None:
        raise ValueError("average='sample' needs segment_ids, to know which tokens form a conversation")
    rows, length = mask.shape
    # Ids restart in every row; there are at most `length` of them in one.
    flat = (segment_ids + jnp.arange(rows, dtype=segment_ids.dtype)[:, None] * (length + 1)).reshape(-1)
    sums = jax.ops.segment_sum(nll.reshape(-1), flat, rows * (length + 1))
    counts = jax.ops.segment_sum(count.reshape(-1), flat, rows * (length + 1))
    return LossOutput(jnp.sum(sums / jnp.maximum(counts, 1.0)), jnp.sum(counts > 0, dtype=jnp.float32))
