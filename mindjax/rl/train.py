"""The GSPO main loop: roll out, score, update; in process (`train`) or from the command line (`main`)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.config import ModelConfig
from mindjax.data.loader import fingerprint
from mindjax.data.packing import BatchShape, epoch_order, size_of
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered
from mindjax.data.samples import DataConfig
from mindjax.experiment import to_dataclass
from mindjax.inference.generate import stop_token_ids
from mindjax.inference.sampler import SamplingConfig, prompt_shape
from mindjax.losses.gspo import gspo_loss
from mindjax.models import qwen3_vl
from mindjax.rl import advantages
from mindjax.rl.rewards import RewardConfig
from mindjax.rl.rollout import Group, PolicyBatch, Prompt, pack_responses, policy_shape, render_prompt, roll_out
from mindjax.train.folder import export, open_model
from mindjax.train.loop import NotFiniteError, Run, TrainResult, save_bad_batch
from mindjax.train.optimizer import OptimizerConfig, learning_rate
from mindjax.train.state import TrainState
from mindjax.train.step import Terms, router_term, train_step
from mindjax.types import Array, LossOutput, Sample
from sharding.remat import Remat

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Params = dict[str, Any]


def frozen_vision() -> OptimizerConfig:
    """A constant small learning rate for the language model alone."""
    return OptimizerConfig(learning_rate=1e-5, schedule="constant", multipliers=(("^vision", 0.0), (".*", 1.0)))


@dataclass(frozen=True)
class RLConfig:
    """One run of GSPO.

    Attributes:
      steps: rollouts, each followed by its updates.
      prompts_per_step: drawn without repetition inside an epoch.
      samples_per_prompt: answers to each, the group that advantages compare.
      updates_per_rollout: the rollout's prompts are split over so many updates, one after the other.
      micro_batches: of an update, accumulated exactly.
      responses_per_row: packed into a row of a micro-batch.
      eps_low, eps_high: of the clip; sequence ratios lie close to 1, and answers of a few tokens need larger ones
        than the defaults, which are the GSPO paper's for long answers.
      level: "sequence" or "token", see `gspo_loss`.
      normalize_deviation: see `advantages.group`.
      temperature: of sampling, and of the log-probabilities that are trained.
      max_new_tokens: of an answer.
      reward: see `RewardConfig`.
      optimizer: see `OptimizerConfig`; the vision encoder is frozen by default.
      remat: what a block keeps for its backward pass, see `sharding.remat`.
      dtype: of the computation, in rollouts too; parameters and optimizer stay float32.
      seed: of the order of prompts and of the sampling.
      checkpoint_every: steps; 0 saves at the end alone.
      keep_checkpoints: how many stay.
      evaluate_every: steps between calls of `evaluate`; 0 calls it at the end alone.
    """

    steps: int = 100
    prompts_per_step: int = 16
    samples_per_prompt: int = 8
    updates_per_rollout: int = 1
    micro_batches: int = 1
    responses_per_row: int = 1
    eps_low: float = 3e-4
    eps_high: float = 4e-4
    level: Literal["sequence", "token"] = "sequence"
    normalize_deviation: bool = True
    temperature: float = 1.0
    max_new_tokens: int = 64
    reward: RewardConfig = field(default_factory=RewardConfig)
    optimizer: OptimizerConfig = field(default_factory=frozen_vision)
    remat: Remat = "none"
    dtype: str = "float32"
    seed: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError("rl: temperature must be positive; greedy answers of a prompt are all the same")
        if self.samples_per_prompt < 2:
            raise ValueError("rl: samples_per_prompt must be at least 2, advantages compare the answers to a prompt")
        if self.prompts_per_step % self.updates_per_rollout:
            raise ValueError(
                f"rl: {self.prompts_per_step} prompts_per_step cannot be split over {self.updates_per_rollout} updates"
            )
        if self.responses_per_update % (self.micro_batches * self.responses_per_row):
            raise ValueError(
                f"rl: {self.responses_per_update} responses of an update cannot be split into {self.micro_batches} "
                f"micro_batches of rows of {self.responses_per_row}"
            )

    @property
    def responses_per_update(self) -> int:
        return self.prompts_per_step // self.updates_per_rollout * self.samples_per_prompt


# What may change when a run is resumed; all else is part of its identity.
FREE_TO_CHANGE = ("checkpoint_every", "keep_checkpoints", "evaluate_every", "remat")


@dataclass(frozen=True)
class GSPOLoss:
    """Packed answers to loss terms; equal ones share a compiled step."""

    model: ModelConfig
    eps_low: float
    eps_high: float
    level: Literal["sequence", "token"]
    temperature: float
    remat: Remat

    def __call__(self, params: Params, policy: PolicyBatch) -> Terms:
        out = qwen3_vl.token_logprobs(params, self.model, policy.batch, temperature=self.temperature, remat=self.remat)
        mask = policy.batch.loss_mask
        # The first update on a rollout is on policy: its own log-probabilities are the old ones, exactly.
        old = jax.lax.stop_gradient(out.logp) if policy.logp_old is None else policy.logp_old
        loss = gspo_loss(
            out.logp,
            old,
            mask,
            policy.advantages,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
            level=self.level,
            response_ids=policy.response_ids,
            num_responses=policy.advantages.shape[0],
        )
        tokens = mask.sum()
        difference = (old - policy.logp_rollout) * mask
        metrics = {
            "policy_loss": (jax.lax.stop_gradient(loss.sum), loss.count),
            "entropy": ((jax.lax.stop_gradient(out.entropy) * mask).sum(), tokens),
            # Between the sampler and the trainer on the same parameters: rounding, or a bug.
            "rollout_difference": (jnp.abs(difference).sum(), tokens),
            "rollout_kl": ((jnp.expm1(difference) - difference).sum(), tokens),
        }
        main = LossOutput(loss.sum, loss.count, {**loss.metrics, **metrics})
        return (main,) if out.router is None else (main, router_term(out.router, self.model))


def train(
    config: RLConfig,
    model: ModelConfig,
    params: Params,
    samples: Sequence[Sample],
    processor: Processor,
    workdir: str | Path,
    *,
    name: str = "gspo",
    evaluate: Callable[[Params], dict[str, float]] | None = None,
) -> TrainResult:
    """Runs GSPO to its end, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: see `RLConfig`.
      model: shapes of the model.
      params: where it starts; they stay valid.
      samples: with answers; a last assistant message is the reference reply and is not shown to the policy.
      processor: renders prompts and decodes answers.
      workdir: for metrics, checkpoints and TensorBoard.
      name: first in the progress line.
      evaluate: called with the parameters; its values are written beside the step's.

    Raises:
      ValueError: fewer samples than `prompts_per_step`, samples without an answer, a checkpoint of another
        configuration.
      NotFiniteError: loss or gradient is not finite.
      Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
    """
    began, workdir = time.monotonic(), Path(workdir)
    if len(samples) < config.prompts_per_step:
        raise ValueError(f"rl: {config.prompts_per_step} prompts_per_step, but there are only {len(samples)} samples")
    prompts = [Prompt(i, sample, render_prompt(sample, processor)) for i, sample in enumerate(samples)]
    loop = _Loop.build(config, model, processor, prompts)
    identity = {
        "rl": {key: value for key, value in asdict(config).items() if key not in FREE_TO_CHANGE},
        "model": asdict(model),
        "data": {
            "prompts": fingerprint([prompt.rendered for prompt in prompts]),
            "answers": hashlib.sha256(repr([sample.answer for sample in samples]).encode()).hexdigest()[:16],
        },
    }
    state = TrainState.create(params, config.optimizer, jax.random.key(config.seed))
    total, tokens, last = config.steps, 0, {}
    with Run(
        workdir,
        identity,
        state,
        name,
        total,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep_checkpoints,
        updates_per_step=config.updates_per_rollout,
    ) as run:
        state, done = run.state, run.done
        while done < total:
            state, values, count = loop.step(state, done, workdir)
            done, tokens = done + 1, tokens + count
            last = {**values, "tokens": count, "seconds": time.monotonic() - began}
            if evaluate and (done == total or (config.evaluate_every and done % config.evaluate_every == 0)):
                last |= evaluate(state.params)
            run.writer.write(done, last)
            shown = ("reward", "pass@1", "informative", "entropy", "length", "clip_low", "clip_high", "rollout_kl")
            run.progress.update(done, {key: last[key] for key in shown}, count)
            if run.saves_after(done):
                run.save(done, state)
    return TrainResult(state.params, done, time.monotonic() - began, tokens, last)


@dataclass(frozen=True)
class _Loop:
    """What stays the same over the steps of a run."""

    config: RLConfig
    model: ModelConfig
    processor: Processor
    prompts: Sequence[Prompt]
    sampling: SamplingConfig
    prefill: BatchShape
    shape: BatchShape
    loss: GSPOLoss

    @classmethod
    def build(cls, config: RLConfig, model: ModelConfig, processor: Processor, prompts: Sequence[Prompt]) -> _Loop:
        sizes = [size_of(prompt.rendered) for prompt in prompts]
        sampling = SamplingConfig(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            num_samples=config.samples_per_prompt,
            stop_token_ids=stop_token_ids(processor),
        )
        shape = policy_shape(
            sizes,
            model,
            responses=config.responses_per_update // config.micro_batches,
            samples=config.samples_per_prompt,
            per_row=config.responses_per_row,
            max_new_tokens=config.max_new_tokens,
        )
        loss = GSPOLoss(model, config.eps_low, config.eps_high, config.level, config.temperature, config.remat)
        prefill = prompt_shape(sizes, config.prompts_per_step, model)
        return cls(config, model, processor, prompts, sampling, prefill, shape, loss)

    def step(self, state: TrainState, number: int, workdir: Path) -> tuple[TrainState, dict[str, float], int]:
        """One rollout and its updates: (new state, metrics, tokens that passed the trainer)."""
        config, began = self.config, time.monotonic()
        params = _cast(state.params, config.dtype)
        groups = roll_out(
            params,
            self.model,
            self.processor,
            self.choose(number),
            sampling=self.sampling,
            seed=config.seed,
            step=number,
            rewards=config.reward.function(config.max_new_tokens),
            weights=config.reward.weights(),
            shape=self.prefill,
        )
        rewards = np.asarray([group.rewards for group in groups])
        scores = advantages.group(rewards, normalize_deviation=config.normalize_deviation)
        batches = self.pack(groups, scores)
        if config.updates_per_rollout > 1:
            old = partial(_old_logprobs, model=self.model, temperature=config.temperature, remat=config.remat)
            batches = [replace(batch, logp_old=old(params, batch.batch)) for batch in batches]
        del params
        rolled = time.monotonic()

        step = train_step(self.loss, config.optimizer, config.dtype)
        collected = []
        first, total = number * config.updates_per_rollout, config.steps * config.updates_per_rollout
        for update, batch in enumerate(batches):
            rate = learning_rate(config.optimizer, first + update, total)
            state, metrics = step(state, batch, rate)
            collected.append(metrics)
        values: dict[str, list[float]] = {}
        for batch, metrics in zip(batches, jax.device_get(collected), strict=True):
            one = {key: float(a) / max(float(b), 1.0) for key, (a, b) in metrics.items()}
            if not np.isfinite([one["loss"], one["grad_norm"]]).all():
                raise NotFiniteError(save_bad_batch(workdir, number + 1, one, batch, rate))
            for key, value in one.items():
                values.setdefault(key, []).append(value)
        ended = time.monotonic()
        return (
            state,
            {
                **summary(groups, config.max_new_tokens),
                **{key: float(np.mean(value)) for key, value in values.items()},
                "learning_rate": rate,
                "rollout_seconds": rolled - began,
                "update_seconds": ended - rolled,
            },
            int(sum((np.asarray(batch.batch.segment_ids) > 0).sum() for batch in batches)),
        )

    def choose(self, number: int) -> list[Prompt]:
        """The prompts of a step: an epoch is a shuffle of all, less what does not fill a step."""
        per_step = self.config.prompts_per_step
        epoch, place = divmod(number, len(self.prompts) // per_step)
        order = epoch_order(len(self.prompts), seed=self.config.seed, epoch=epoch)
        return [self.prompts[i] for i in order[place * per_step : (place + 1) * per_step]]

    def pack(self, groups: Sequence[Group], scores: np.ndarray) -> list[PolicyBatch]:
        """For each update, its micro-batches stacked."""
        config = self.config
        responses: list[tuple[Rendered, Any, float]] = [
            (group.prompt.rendered, completion, float(score))
            for group, row in zip(groups, scores, strict=True)
            for completion, score in zip(group.completions, row, strict=True)
        ]
        size = config.responses_per_update // config.micro_batches
        packed = [
            pack_responses(responses[start : start + size], self.shape, config.responses_per_row)
            for start in range(0, len(responses), size)
        ]
        m = config.micro_batches
        return [jax.tree.map(lambda *x: np.stack(x), *packed[i : i + m]) for i in range(0, len(packed), m)]


def summary(groups: Sequence[Group], max_new_tokens: int) -> dict[str, float]:
    """What a rollout says about the policy: rewards by part, pass@1, informative groups, lengths."""
    completions = [completion for group in groups for completion in group.completions]
    names = groups[0].parts[0].keys()
    return {
        "reward": float(np.mean([group.rewards for group in groups])),
        **{f"reward_{name}": float(np.mean([[p[name] for p in group.parts] for group in groups])) for name in names},
        "pass@1": float(np.mean([group.correct.mean() for group in groups])),
        "pass@n": float(np.mean([group.correct.max() for group in groups])),
        "informative": float(np.mean([group.informative for group in groups])),
        "length": float(np.mean([len(completion.token_ids) for completion in completions])),
        "cut": float(np.mean([completion.finish_reason == "length" for completion in completions])),
    }


@partial(jax.jit, static_argnames="dtype")
def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@partial(jax.jit, static_argnames=("model", "temperature", "remat"))
def _old_logprobs(params: Params, batches: Any, *, model: ModelConfig, temperature: float, remat: Remat) -> Array:
    """The trainer's log-probabilities of stacked micro-batches, [micro_batches, B, T]."""

    def one(batch: Any) -> Array:
        return qwen3_vl.token_logprobs(params, model, batch, temperature=temperature, remat=remat).logp

    return jax.lax.map(one, batches)


@dataclass(frozen=True)
class RLRun:
    """What an experiment of kind "rl" sets.

    Attributes:
      model: a model folder, or a catalog name for random weights.
      train: see `RLConfig`.
      data: samples with answers.
      max_pixels: of an image; 0 leaves the processor's own limit. A model without a folder needs one.
    """

    model: str
    train: RLConfig
    data: DataConfig
    max_pixels: int = 0


def main(config: ConfigDict, workdir: Path) -> None:
    """Trains a model on verifiable samples and writes the result, an HF folder, to `<workdir>/model`."""
    run = to_dataclass(RLRun, {key: value for key, value in config.items() if key != "kind"})
    samples = run.data.load()
    model, params, processor = open_model(run.model, samples, run.max_pixels)
    result = train(run.train, model, params, samples, processor, workdir)
    export(workdir / "model", model, result.params, processor)
    print(f"{result.steps} steps; the model is in {workdir / 'model'}")
