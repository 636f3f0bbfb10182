"""Group Sequence Policy Optimization: clipping and importance ratios of whole responses.

Source: Zheng et al. 2025, "Group Sequence Policy Optimization" (arXiv 2507.18071), eq. 5 to 7 (sequence form) and
eq. 13, 14 (token form). Minimised is

    L = - mean_i w_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i) + kl_coefficient mean_i mean_t KL_it
    s_i = exp(sum_t m_it (logp_it - logp_old_it) / |y_i|),   |y_i| = sum_t m_it

over the responses i that hold at least one policy token. Two parts are off by default: dual clip (Ye et al. 2020,
arXiv 1912.09729), which makes the minimum max(min(...), dual_clip A_i) where A_i < 0; and the KL term.

With d = logp - logp_ref at the sampled token, the KL terms (Schulman 2020, "Approximating KL Divergence") estimate
KL(policy || reference), but what they do as a loss is the mean of their gradient over the policy's own samples:

    k1 = d             gradient grad logp, of mean 0: it pulls towards nothing and only adds noise
    k2 = d^2 / 2       gradient d grad logp, whose mean is the gradient of KL(policy || reference)
    k3 = e^-d - 1 + d  gradient (1 - e^-d) grad logp, whose mean is the gradient of KL(reference || policy)

To hold the policy to its reference in the usual sense take k2; k3 is what most others call their KL term; k1 is for
reading the number (kl_coefficient = 0) and for comparisons.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from mindjax.types import Array, LossOutput

# |log s_i| beyond this has long been clipped; the clamp only keeps exp() finite where a policy ran away.
MAX_LOG_RATIO = 20.0

KLEstimator = Literal["none", "k1", "k2", "k3"]


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
    dual_clip: float = 0.0,
    logp_ref: Array | None = None,
    kl: KLEstimator = "none",
    kl_coefficient: float = 0.0,
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
        level="token" only (a token weight and its mean over the response have different gradients). They do not
        multiply the KL term.
      dual_clip: the ratio beyond which a response (or token) with a negative advantage stops counting; > 1, 0 is off.
      logp_ref: [B, T] log-probabilities of the taken tokens under the reference policy; never differentiated.
      kl: the estimator of the divergence from the reference, see above. Its mean is over the tokens of a response,
        then over responses. It is not reweighted for the difference between the policy and the one that sampled.
      kl_coefficient: of the KL term in the loss; 0 only reports it.

    Returns:
      The summed loss, the number of responses with a policy token, and as metrics `clip_low`, `clip_high` and, with
      dual clip, `clip_dual` (share of responses, or of policy tokens at level="token", whose gradient each clip
      removed), `ratio` (mean of s_i), `ratio_deviation` (mean of |s_i - 1|), `approx_kl` (mean over policy tokens of
      the estimator exp(-d) - 1 + d, d = logp - logp_old, of the divergence from the old to the new policy) and, with
      a `kl`, `reference_kl` (its mean over responses). Maxima: `ratio_max` and `ratio_inverse_max` (of s_i and
      1 / s_i).

    Raises:
      ValueError: for shapes that do not fit, an unknown level, negative eps, token weights at level="sequence", a dual
        clip below 1, or a KL term without its reference, its estimator or with a negative coefficient.
    """
    _check(logp, logp_old, mask, advantages, eps_low, eps_high, level, response_ids, num_responses, weights)
    _check_optional(logp, dual_clip, logp_ref, kl, kl_coefficient)
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
        objective, *clips = _clipped(ratio, advantages, eps_low, eps_high, dual_clip)
        if weights is not None:
            objective = objective * jnp.where(present > 0, weights, 0.0)
        counted = present
    else:
        # A straight-through ratio: the value of s_i at every token, the gradient of that token alone.
        token_ratio = jax.lax.stop_gradient(per_token(ratio)) * jnp.exp(logp - jax.lax.stop_gradient(logp))
        if advantages.ndim == 1:
            advantages = per_token(advantages)
        advantages = jnp.where(policy, advantages, 0.0)
        by_token, *clips = _clipped(token_ratio, advantages, eps_low, eps_high, dual_clip)
        if weights is not None:
            weights = per_token(weights) if weights.ndim == 1 else weights
            by_token = by_token * jnp.where(policy, weights, 0.0)
        objective = per_response(by_token) / lengths
        counted = mask

    total, count = -objective.sum(), present.sum()
    # exp() of an unclamped difference would overflow in a metric before the loss notices anything.
    difference = jnp.clip(logp - logp_old, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    names = ("clip_low", "clip_high", "clip_dual")[: 3 if dual_clip else 2]
    metrics = {
        **{name: ((clip * counted).sum(), counted.sum()) for name, clip in zip(names, clips, strict=False)},
        "ratio": ((ratio * present).sum(), count),
        "ratio_deviation": ((jnp.abs(ratio - 1.0) * present).sum(), count),
        "approx_kl": (((jnp.expm1(-difference) + difference) * mask).sum(), mask.sum()),
    }
    maxima = {"ratio_max": (ratio * present).max(), "ratio_inverse_max": (present / ratio).max()}
    if logp_ref is not None:
        logp_ref = jax.lax.stop_gradient(jnp.where(policy, logp_ref.astype(jnp.float32), 0.0))
        divergence = (per_response(_kl(logp - logp_ref, kl)) / lengths).sum()
        total = total + kl_coefficient * divergence
        metrics["reference_kl"] = (divergence, count)
    return LossOutput(total, count, *jax.lax.stop_gradient((metrics, maxima)))


def _kl(difference: Array, kl: str) -> Array:
    """The estimate at each token from logp - logp_ref; 0 where that is 0."""
    if kl == "k1":
        return difference
    if kl == "k2":
        return 0.5 * difference**2
    difference = jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(-difference) + difference


def _clipped(
    ratio: Array, advantages: Array, eps_low: float, eps_high: float, dual_clip: float
) -> tuple[Array, Array, Array, Array]:
    """min(ratio A, clip(ratio) A), and where a clip took the gradient away: below, above, and by the dual clip.

    Written as a choice, because the gradient of `minimum` is split where both sides are equal.
    """
    low = (advantages < 0) & (ratio < 1.0 - eps_low)
    high = (advantages > 0) & (ratio > 1.0 + eps_high)
    dual = (advantages < 0) & (ratio > dual_clip) if dual_clip else jnp.zeros_like(low)
    clipped = jnp.clip(ratio, 1.0 - eps_low, 1.0 + eps_high)
    clipped = jax.lax.stop_gradient(jnp.where(dual, dual_clip, clipped))
    objective = jnp.where(low | high | dual, clipped, ratio) * advantages
    return objective, low.astype(jnp.float32), high.astype(jnp.float32), dual.astype(jnp.float32)


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


def _check_optional(logp: Array, dual_clip: float, logp_ref: Array | None, kl: str, kl_coefficient: float) -> None:
    if dual_clip != 0 and not dual_clip > 1:
        raise ValueError(
            f"dual_clip is {dual_clip}; it must be above 1, the ratio of an unchanged policy, or 0 for none"
        )
    if kl not in ("none", "k1", "k2", "k3"):
        raise ValueError(f"kl is {kl!r}; it must be 'none', 'k1', 'k2' or 'k3'")
    if not kl_coefficient >= 0:
        raise ValueError(
            f"kl_coefficient is {kl_coefficient}; a negative one would drive the policy from its reference"
        )
    if kl == "none" and (logp_ref is not None or kl_coefficient != 0):
        raise ValueError("logp_ref and kl_coefficient need an estimator: kl='k2', or 'k1' or 'k3'")
    if kl != "none" and (logp_ref is None or logp_ref.shape != logp.shape):
        shape = None if logp_ref is None else logp_ref.shape
        raise ValueError(f"kl={kl!r} needs logp_ref of the shape of logp, {logp.shape}, not {shape}")
