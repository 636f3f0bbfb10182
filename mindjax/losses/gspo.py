"""Group Sequence Policy Optimization: clipping and importance ratios of whole responses.

Source: Zheng et al. 2025, "Group Sequence Policy Optimization" (arXiv 2507.18071), eq. 5 to 7 (sequence form) and
eq. 13, 14 (token form); no KL term. Minimised is

    L = - mean_i w_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i)
    s_i = exp(sum_t m_it (logp_it - logp_old_it) / |y_i|),   |y_i| = sum_t m_it

over the responses i that hold at least one policy token.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from mindjax.types import Array, LossOutput

# |log s_i| beyond this has long been clipped; the clamp only keeps exp() finite where a policy ran away.
MAX_LOG_RATIO = 20.0
MAX_RATIO = math.exp(MAX_LOG_RATIO)


def gspo_loss(
    logp: Array,
    logp_old: Array,
    mask: Array,
    advantages: Array,
    *,
    eps_low: float,
    eps_high: float,
    level: Literal["sequence", "token"] = "sequence",
    response_ids: Array | None = None,
    num_responses: int | None = None,
    weights: Array | None = None,
) -> LossOutput:
    """The GSPO loss, as a sum over responses and their count.

    Computed in float32 whatever comes in: the eps of this method lie below the spacing of bfloat16 at 1.

    Args:
      logp: [B, T] log-probabilities of the taken tokens under the policy that is being updated.
      logp_old: [B, T] the same under the policy at the start of the step; never differentiated.
      mask: [B, T] 1 for policy tokens, 0 for prompt, image, tool and padding tokens. What the other arrays hold
        where the mask is 0 has no influence, NaN included.
      advantages: one per response, [responses], or one per token, [B, T]. The sequence form has one advantage per
        response, so it takes the mean of per-token values over the response; the token form uses each.
      eps_low: how far below 1 the ratio may fall before a response with a negative advantage stops counting.
      eps_high: how far above 1 it may rise before a response with a positive advantage does.
      level: "sequence", or "token" for `sg[s_i] exp(logp - sg[logp])` at each token, averaged over the response.
        Both have the same value and gradient where the advantages are constant within a response.
      response_ids: [B, T] int, which response a token belongs to, 1 .. num_responses over the whole batch, 0 for
        none; a response lies in one row. None means that each row is one response.
      num_responses: how many responses `response_ids` can name; static.
      weights: off-policy weights, multiplied in after the minimum, never differentiated: [responses], or [B, T] with
        level="token" only (a token weight and its mean over the response have different gradients).

    Returns:
      The summed loss, the number of responses with a policy token, and as metrics `clip_low` and `clip_high` (share
      of responses, or of policy tokens at level="token", whose gradient the clip removed), `ratio` (mean of s_i),
      `ratio_deviation` (mean of |s_i - 1|), `ratio_min`, `ratio_max` (their mean over micro-batches, when several
      are summed), and `approx_kl` (mean over policy tokens of the estimator exp(-d) - 1 + d, d = logp - logp_old, of
      the divergence from the old to the new policy).

    Raises:
      ValueError: for shapes that do not fit, an unknown level, negative eps, or token weights at level="sequence".
    """
    _check(logp, logp_old, mask, advantages, eps_low, eps_high, level, response_ids, num_responses, weights)
    rows, _ = logp.shape
    if response_ids is None:
        num_responses = rows
        response_ids = jnp.broadcast_to(jnp.arange(1, rows + 1, dtype=jnp.int32)[:, None], logp.shape)
    assert num_responses is not None

    policy = (mask > 0) & (response_ids > 0)
    ids = jnp.where(policy, response_ids, 0)
    mask = policy.astype(jnp.float32)
    # Both sides of each `where` must be finite, or garbage in padding comes back through the gradient.
    logp = jnp.where(policy, logp.astype(jnp.float32), 0.0)
    logp_old = jax.lax.stop_gradient(jnp.where(policy, logp_old.astype(jnp.float32), 0.0))

    def per_response(values: Array) -> Array:
        """[B, T] -> [responses], summed over the policy tokens of each."""
        summed = jax.ops.segment_sum(values.ravel(), ids.ravel(), num_segments=num_responses + 1)
        return summed[1:]

    def per_token(values: Array) -> Array:
        """[responses] -> [B, T], 0 outside of policy tokens."""
        return jnp.concatenate([jnp.zeros((1,), jnp.float32), values])[ids]

    lengths = per_response(mask)
    present = (lengths > 0).astype(jnp.float32)
    lengths = jnp.maximum(lengths, 1.0)
    log_ratio = jnp.clip(per_response(logp - logp_old) / lengths, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)

    advantages = jax.lax.stop_gradient(advantages.astype(jnp.float32))
    weights = None if weights is None else jax.lax.stop_gradient(weights.astype(jnp.float32))
    if level == "sequence":
        if advantages.ndim == 2:
            advantages = per_response(jnp.where(policy, advantages, 0.0)) / lengths
        advantages = jnp.where(present > 0, advantages, 0.0)
        objective, low, high = _clipped(ratio, advantages, eps_low, eps_high)
        if weights is not None:
            objective = objective * jnp.where(present > 0, weights, 0.0)
        clip_count = present.sum()
        low, high = (low * present).sum(), (high * present).sum()
    else:
        # A straight-through ratio: the value of s_i at every token, the gradient of that token alone.
        token_ratio = jax.lax.stop_gradient(per_token(ratio)) * jnp.exp(logp - jax.lax.stop_gradient(logp))
        if advantages.ndim == 1:
            advantages = per_token(advantages)
        advantages = jnp.where(policy, advantages, 0.0)
        by_token, low, high = _clipped(token_ratio, advantages, eps_low, eps_high)
        if weights is not None:
            weights = per_token(weights) if weights.ndim == 1 else weights
            by_token = by_token * jnp.where(policy, weights, 0.0)
        objective = per_response(by_token) / lengths
        clip_count = mask.sum()
        low, high = (low * mask).sum(), (high * mask).sum()

    count = present.sum()
    # exp() of an unclamped difference would overflow in a metric before the loss notices anything.
    difference = jnp.clip(logp - logp_old, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    any_present = (count > 0).astype(jnp.float32)
    metrics = {
        "clip_low": (low, clip_count),
        "clip_high": (high, clip_count),
        "ratio": ((ratio * present).sum(), count),
        "ratio_deviation": ((jnp.abs(ratio - 1.0) * present).sum(), count),
        "ratio_min": (jnp.where(present > 0, ratio, MAX_RATIO).min() * any_present, any_present),
        "ratio_max": (jnp.where(present > 0, ratio, 0.0).max(), any_present),
        "approx_kl": (((jnp.expm1(-difference) + difference) * mask).sum(), mask.sum()),
    }
    return LossOutput(-objective.sum(), count, jax.lax.stop_gradient(metrics))


def _clipped(ratio: Array, advantages: Array, eps_low: float, eps_high: float) -> tuple[Array, Array, Array]:
    """min(ratio A, clip(ratio) A), and where the clip took the gradient away, below and above.

    Written as a choice, because the gradient of `minimum` is split where both sides are equal.
    """
    low = (advantages < 0) & (ratio < 1.0 - eps_low)
    high = (advantages > 0) & (ratio > 1.0 + eps_high)
    clipped = jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - eps_low, 1.0 + eps_high))
    objective = jnp.where(low | high, clipped, ratio) * advantages
    return objective, low.astype(jnp.float32), high.astype(jnp.float32)


def _check(
    logp: Array,
    logp_old: Array,
    mask: Array,
    advantages: Array,
    eps_low: float,
    eps_high: float,
    level: str,
    response_ids: Array | None,
    num_responses: int | None,
    weights: Array | None,
) -> None:
    """Raises ValueError for arguments that do not fit together; looks at shapes alone, so it works under jit."""
    if logp.ndim != 2:
        raise ValueError(f"logp must be [batch, time], got shape {logp.shape}; add a batch axis with logp[None]")
    for name, array in (("logp_old", logp_old), ("mask", mask), ("response_ids", response_ids)):
        if array is not None and array.shape != logp.shape:
            raise ValueError(f"{name} has shape {array.shape}, but logp has {logp.shape}; they must be equal")
    if level not in ("sequence", "token"):
        raise ValueError(f"level is {level!r}; it must be 'sequence' or 'token'")
    if eps_low < 0 or eps_high < 0:
        raise ValueError(f"eps_low and eps_high are distances from 1 and must not be negative: {eps_low}, {eps_high}")
    if (response_ids is None) != (num_responses is None):
        raise ValueError("give response_ids and num_responses together, or neither")
    responses = logp.shape[0] if num_responses is None else num_responses
    for name, array in (("advantages", advantages), ("weights", weights)):
        if array is not None and array.shape not in ((responses,), logp.shape):
            raise ValueError(
                f"{name} has shape {array.shape}; give one per response, ({responses},), or per token, {logp.shape}"
            )
    if weights is not None and weights.ndim == 2 and level == "sequence":
        raise ValueError("weights per token need level='token'; at level='sequence' give one weight per response")
