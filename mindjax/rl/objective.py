"""The loss of a micro-batch of answers, from parameters to terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax

from mindjax.config import ModelConfig
from mindjax.losses.gspo import gspo_loss
from mindjax.losses.off_policy import OffPolicyConfig, divergence, off_policy_weights
from mindjax.models import qwen3_vl
from mindjax.rl.config import RLConfig
from mindjax.rl.rollout import PolicyBatch
from mindjax.train.step import Terms, router_term
from mindjax.types import Array, LossOutput
from sharding.parallel import Parallel
from sharding.remat import Remat

Params = dict[str, Any]


@dataclass(frozen=True)
class GSPOLoss:
    """Packed answers to loss terms; equal ones share a compiled step."""

    model: ModelConfig
    eps_low: float
    eps_high: float
    level: Literal["sequence", "token"]
    temperature: float
    remat: Remat
    dual_clip: float = 0.0
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    kl_coefficient: float = 0.0
    off_policy: OffPolicyConfig = field(default_factory=OffPolicyConfig)
    parallel: Parallel | None = None

    @classmethod
    def of(cls, config: RLConfig, model: ModelConfig, parallel: Parallel | None = None) -> GSPOLoss:
        return cls(
            model, config.eps_low, config.eps_high, config.level, config.temperature, config.remat, config.dual_clip,
            config.kl, config.kl_coefficient, config.off_policy, parallel,
        )  # fmt: skip

    def __call__(self, params: Params, policy: PolicyBatch) -> Terms:
        out = qwen3_vl.token_logprobs(
            params,
            self.model,
            policy.batch,
            mask=policy.batch.loss_mask,
            temperature=self.temperature,
            vision_features=policy.vision_features,
            remat=self.remat,
            parallel=self.parallel,
        )
        mask = policy.batch.loss_mask
        # The first update on a rollout is on policy: its own log-probabilities are the old ones, exactly.
        old = jax.lax.stop_gradient(out.logp) if policy.logp_old is None else policy.logp_old
        ids, count = policy.response_ids, policy.advantages.shape[0]
        weights, weight_metrics = off_policy_weights(
            old, policy.logp_rollout, mask, self.off_policy, response_ids=ids, num_responses=count
        )
        loss = gspo_loss(
            out.logp,
            old,
            mask,
            policy.advantages,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
            level=self.level,
            response_ids=ids,
            num_responses=count,
            weights=weights,
            dual_clip=self.dual_clip,
            logp_ref=policy.logp_reference,
            kl=self.kl,
            kl_coefficient=self.kl_coefficient,
        )
        # Between the sampler and the trainer: rounding on the same parameters, 8-bit weights, older ones, or a bug.
        gaps, largest_gaps = divergence(old, policy.logp_rollout, mask)
        metrics = {
            "policy_loss": (jax.lax.stop_gradient(loss.sum), loss.count),
            "entropy": ((jax.lax.stop_gradient(out.entropy) * mask).sum(), mask.sum()),
        }
        main = LossOutput(
            loss.sum, loss.count, {**loss.metrics, **weight_metrics, **gaps, **metrics}, {**loss.maxima, **largest_gaps}
        )
        return (main,) if out.router is None else (main, router_term(out.router, self.model))


@partial(jax.jit, static_argnames=("model", "temperature", "remat", "parallel"))
def trainer_logprobs(
    params: Params,
    policies: PolicyBatch,
    *,
    model: ModelConfig,
    temperature: float,
    remat: Remat,
    parallel: Parallel | None = None,
) -> Array:
    """The trainer's own log-probabilities of stacked micro-batches, [micro_batches, B, T]."""

    def one(policy: PolicyBatch) -> Array:
        return qwen3_vl.token_logprobs(
            params,
            model,
            policy.batch,
            mask=policy.batch.loss_mask,
            temperature=temperature,
            vision_features=policy.vision_features,
            remat=remat,
            parallel=parallel,
        ).logp

    return jax.lax.map(one, policies)
