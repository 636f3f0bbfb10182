"""The trainer's log-probabilities against the rollout's: correction weights, and how far the two are apart.

A rollout engine (8-bit weights, another kernel, weights one step older) samples from a distribution that is not quite
the one the trainer computes. With d_t = logp_old_t - logp_rollout_t, trainer less rollout at the sampled tokens,

    token: w_t = exp(d_t);   sequence: w = exp(sum_t d_t);   geometric: w = exp(mean_t d_t)

are importance weights towards the trainer's distribution. Truncated ones, min(w, C), are V-trace's (Espeholt et al.
2018, arXiv:1802.01561) and truncated importance sampling's (Ionides 2008); masking sets weights outside of an
interval to 0. `sequence` alone is unbiased before it is cut; `geometric` is a per-token rate, close to 1 whatever the
length. They multiply the loss after min and clip, and have no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from mindjax.types import Array

Metrics = dict[str, tuple[Array, Array]]

# exp() of more than this would make one token's estimate, and with it the mean, infinite.
MAX_LOG_DIFFERENCE = 20.0

# Means over tokens of s, d, s^2, d^2 and s d, for s = logp_old + logp_rollout and d = logp_old - logp_rollout.
MOMENTS = ("pearson_s", "pearson_d", "pearson_ss", "pearson_dd", "pearson_sd")


@dataclass(frozen=True)
class OffPolicyConfig:
    """How the loss is corrected for a rollout that is not the trainer's policy.

    Attributes:
      level: "none"; "token", one weight per token, for `gspo_loss` at level="token" alone; "sequence", the product of
        them; or "geometric", their geometric mean.
      mode: "truncate" for min(w, cap); "mask" for w where floor <= w <= cap and 0 elsewhere.
      cap: the largest weight.
      floor: the smallest that mode="mask" keeps.
    """

    level: Literal["none", "token", "sequence", "geometric"] = "none"
    mode: Literal["truncate", "mask"] = "truncate"
    cap: float = 2.0
    floor: float = 0.5

    def __post_init__(self) -> None:
        if self.level not in ("none", "token", "sequence", "geometric"):
            raise ValueError(f"off_policy: level must be none, token, sequence or geometric, not {self.level!r}")
        if self.mode not in ("truncate", "mask"):
            raise ValueError(f"off_policy: mode must be truncate or mask, not {self.mode!r}")
        if not 1.0 <= self.cap < math.inf:
            raise ValueError(f"off_policy: cap must be at least 1, the weight without any difference, not {self.cap}")
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"off_policy: floor must lie in [0, 1], 1 being no difference, not {self.floor}")


def off_policy_weights(
    logp_old: Array,
    logp_rollout: Array,
    mask: Array,
    config: OffPolicyConfig,
    *,
    response_ids: Array | None = None,
    num_responses: int | None = None,
) -> tuple[Array | None, Metrics]:
    """The weights that `gspo_loss` takes as `weights`, in float32, without a gradient.

    Args:
      logp_old: [B, T] log-probabilities of the taken tokens under the trainer's policy at the start of the step.
      logp_rollout: [B, T] the same as the rollout engine reported them.
      mask: [B, T] 1 for policy tokens. What else stands where it is 0 has no influence, NaN included; a NaN at a
        policy token stays one, so that a missing log-probability stops the step instead of passing as agreement.
      config: see `OffPolicyConfig`.
      response_ids, num_responses: of packed rows, as in `gspo_loss`.

    Returns:
      (weights, metrics): weights [responses], [B, T] at level "token", None at level "none"; a response without
      policy tokens has weight 1 (0 tokens, no difference). Metrics `off_policy_weight`, the mean weight, and
      `off_policy_cut`, the share that was truncated or masked, over responses or, at level "token", policy tokens.

    Raises:
      ValueError: for shapes that do not fit.
    """
    if config.level == "none":
        return None, {}
    _check(logp_old, logp_rollout, mask)
    if (response_ids is None) != (num_responses is None):
        raise ValueError("give response_ids and num_responses together, or neither")
    if response_ids is None:
        num_responses = logp_old.shape[0]
        response_ids = jnp.broadcast_to(jnp.arange(1, num_responses + 1, dtype=jnp.int32)[:, None], logp_old.shape)
    elif response_ids.shape != logp_old.shape:
        raise ValueError(f"response_ids has shape {response_ids.shape}, logp_old {logp_old.shape}; they must be equal")
    assert num_responses is not None

    policy = (mask > 0) & (response_ids > 0)
    difference = _difference(logp_old, logp_rollout, policy)
    if config.level == "token":
        log_weight, present = difference, policy
    else:
        ids = jnp.where(policy, response_ids, 0).ravel()
        lengths = jax.ops.segment_sum(policy.astype(jnp.float32).ravel(), ids, num_segments=num_responses + 1)[1:]
        log_weight = jax.ops.segment_sum(difference.ravel(), ids, num_segments=num_responses + 1)[1:]
        if config.level == "geometric":
            log_weight = log_weight / jnp.maximum(lengths, 1.0)
        present = lengths > 0
    raw = jnp.exp(log_weight)  # may be infinite, and is cut then
    if config.mode == "truncate":
        cut = raw > config.cap
        weights = jnp.where(cut, config.cap, raw)
    else:
        cut = (raw > config.cap) | (raw < config.floor)
        weights = jnp.where(cut, 0.0, raw)
    count = present.sum().astype(jnp.float32)
    metrics = {
        "off_policy_weight": (jnp.where(present, weights, 0.0).sum(), count),
        "off_policy_cut": ((cut & present).sum().astype(jnp.float32), count),
    }
    return weights, metrics


def divergence(logp_old: Array, logp_rollout: Array, mask: Array) -> tuple[Metrics, dict[str, Array]]:
    """How far trainer and rollout are apart at the sampled tokens, in float32, without a gradient.

    Args:
      logp_old, logp_rollout, mask: [B, T], as in `off_policy_weights`.

    Returns:
      (metrics, maxima). Metrics are (sum, count) over policy tokens: `rollout_kl`, the estimator exp(d) - 1 - d of
      KL(rollout || trainer), never negative; `rollout_difference`, mean |d|, in nats; and the five `MOMENTS` that
      `with_pearson` turns into `rollout_pearson` once they are averaged over everything. Maxima: `rollout_max`, the
      largest |d|.

    Raises:
      ValueError: for shapes that do not fit.
    """
    _check(logp_old, logp_rollout, mask)
    policy = mask > 0
    d = _difference(logp_old, logp_rollout, policy)
    s = jnp.where(policy, jax.lax.stop_gradient(logp_old.astype(jnp.float32) + logp_rollout.astype(jnp.float32)), 0.0)
    count = policy.sum().astype(jnp.float32)
    bounded = jnp.clip(d, -MAX_LOG_DIFFERENCE, MAX_LOG_DIFFERENCE)
    terms = {
        "rollout_kl": jnp.expm1(bounded) - bounded,
        "rollout_difference": jnp.abs(d),
        **dict(zip(MOMENTS, (s, d, s * s, d * d, s * d), strict=True)),
    }
    return {name: (term.sum(), count) for name, term in terms.items()}, {"rollout_max": jnp.abs(d).max()}


def with_pearson(values: Mapping[str, float]) -> dict[str, float]:
    """Averaged metrics with the `MOMENTS` replaced by `rollout_pearson`, the correlation of the log-probabilities.

    From moments of sum and difference, as the correlation of interest lies within rounding of 1: those of the two
    log-probabilities themselves would cancel. Where either side does not vary, nothing correlates: 1 if the two are
    equal up to a shift, else 0. Values without the moments come back as they are.
    """
    if MOMENTS[0] not in values:
        return dict(values)
    s, d, ss, dd, sd = (float(values[name]) for name in MOMENTS)
    var_s, var_d, cov = max(ss - s * s, 0.0), max(dd - d * d, 0.0), sd - s * d
    # var_s - var_d = 4 cov(old, rollout); (var_s + var_d)^2 - 4 cov^2 = 16 var(old) var(rollout).
    scale = (var_s + var_d) ** 2 - 4 * cov * cov
    if scale > 0:
        pearson = min(max((var_s - var_d) / math.sqrt(scale), -1.0), 1.0)
    else:
        pearson = 1.0 if var_d == 0 else 0.0
    return {name: value for name, value in values.items() if name not in MOMENTS} | {"rollout_pearson": pearson}


def _check(logp_old: Array, logp_rollout: Array, mask: Array) -> None:
    if logp_old.ndim != 2:
        raise ValueError(f"logp_old must be [batch, time], got shape {logp_old.shape}; add a batch axis with [None]")
    for name, array in (("logp_rollout", logp_rollout), ("mask", mask)):
        if array.shape != logp_old.shape:
            raise ValueError(f"{name} has shape {array.shape}, logp_old {logp_old.shape}; they must be equal")


def _difference(logp_old: Array, logp_rollout: Array, policy: Array) -> Array:
    difference = logp_old.astype(jnp.float32) - logp_rollout.astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.where(policy, difference, 0.0))
