"""Direct Preference Optimization: the chosen answer should be likelier than the rejected one.

    L = - log sigmoid( beta [ (logp_w - ref_w) - (logp_l - ref_l) ] )

with sequence log-probabilities, which are sums over the response. Without a reference, ref = 0 (MindGPT-4ov, eq. 13);
with one it is Rafailov et al. 2023, "Direct Preference Optimization" (arXiv:2305.18290), eq. 7.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mindjax.types import Array, LossOutput


def dpo_loss(
    logp_chosen: Array,
    logp_rejected: Array,
    *,
    beta: float,
    ref_chosen: Array | None = None,
    ref_rejected: Array | None = None,
    valid: Array | None = None,
) -> LossOutput:
    """The DPO loss over pairs, computed in float32.

    Args:
      logp_chosen, logp_rejected: [pairs] log-probabilities of the answers under the policy, summed over tokens.
      beta: how sharply a difference of log-probabilities counts; > 0.
      ref_chosen, ref_rejected: [pairs] the same under the reference model, both or neither; never differentiated.
      valid: [pairs] 0 for places that hold no pair (packed batches); what else stands there has no influence.

    Returns:
      The sum over pairs and their number, with metrics `accuracy` (share of pairs with a positive margin),
      `margin` (mean difference of the rewards), `reward_chosen` and `reward_rejected` (beta times the log-ratio to
      the reference).
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if (ref_chosen is None) != (ref_rejected is None):
        raise ValueError("give ref_chosen and ref_rejected, or neither")
    chosen, rejected = logp_chosen.astype(jnp.float32), logp_rejected.astype(jnp.float32)
    if ref_chosen is not None and ref_rejected is not None:
        chosen = chosen - jax.lax.stop_gradient(ref_chosen.astype(jnp.float32))
        rejected = rejected - jax.lax.stop_gradient(ref_rejected.astype(jnp.float32))
    weight = jnp.ones_like(chosen) if valid is None else (valid > 0).astype(jnp.float32)
    # Before anything nonlinear, so that neither value nor gradient of an empty place reaches the sum.
    chosen, rejected = jnp.where(weight > 0, chosen, 0.0), jnp.where(weight > 0, rejected, 0.0)
    margin = beta * (chosen - rejected)
    count = jnp.sum(weight)

    def mean(values: Array) -> tuple[Array, Array]:
        return jnp.sum(jax.lax.stop_gradient(values) * weight), count

    return LossOutput(
        jnp.sum(-jax.nn.log_sigmoid(margin) * weight),
        count,
        {
            "accuracy": mean((margin > 0).astype(jnp.float32)),
            "margin": mean(margin),
            "reward_chosen": mean(beta * chosen),
            "reward_rejected": mean(beta * rejected),
        },
    )
