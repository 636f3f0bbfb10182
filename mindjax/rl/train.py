"""The GSPO main loop: roll out, score, update; in process (`train`) or from the command line (`main`)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.config import ModelConfig
from mindjax.data.loader import fingerprint
from mindjax.data.packing import BatchShape, size_of
from mindjax.data.placing import placement, shards_of_process
from mindjax.data.processor import Processor
from mindjax.data.samples import DataConfig
from mindjax.experiment import to_dataclass
from mindjax.inference.generate import stop_token_ids
from mindjax.inference.sampler import SamplingConfig, prompt_shape
from mindjax.losses.off_policy import with_pearson
from mindjax.models import qwen3_vl
from mindjax.models.spread import check_batch
from mindjax.rl import advantages, schedule
from mindjax.rl.config import FREE_TO_CHANGE, RLConfig
from mindjax.rl.distance import PairClassifier
from mindjax.rl.engine import NativeEngine, Pictures, RolloutEngine
from mindjax.rl.environments import Environment, play
from mindjax.rl.objective import GSPOLoss, trainer_logprobs
from mindjax.rl.rewards import Rewarder
from mindjax.rl.rollout import (
    Group,
    PolicyBatch,
    Prompt,
    Response,
    Rollout,
    pack_responses,
    policy_shape,
    read_pictures,
    roll_out,
)
from mindjax.rl.schedule import PASS_AT_K, Position
from mindjax.rl.shapes import trajectory_shape, turn_shapes
from mindjax.rl.show import show
from mindjax.train.folder import export, open_model
from mindjax.train.loop import NotFiniteError, Run, TrainResult, save_bad_batch
from mindjax.train.optimizer import learning_rate, multipliers
from mindjax.train.state import TrainState
from mindjax.train.step import train_step
from mindjax.types import Array, Sample
from sharding.parallel import Parallel
from sharding.processes import is_first

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Params = dict[str, Any]
# In the progress line, in this order.
SHOWN = ("reward", "pass@1", "pass@n", "informative", "entropy", "length", "clip_low", "clip_high", "rollout_kl")


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
    engine: RolloutEngine | None = None,
    environment: Environment | None = None,
    load_classifier: Callable[[str], PairClassifier] | None = None,
) -> TrainResult:
    """Runs GSPO to its end, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: see `RLConfig`.
      model: shapes of the model.
      params: where it starts; they stay valid.
      samples: with answers; a last assistant message is the reference reply and is not shown to the policy.
      processor: renders prompts and decodes answers.
      workdir: for metrics, rollouts to look at, checkpoints and TensorBoard.
      name: first in the progress line.
      evaluate: called with the parameters; its values are written beside the step's.
      engine: samples the answers; the caller closes it. None samples in this process.
      environment: answers the policy, in conversations of several turns; None asks for one answer.
      load_classifier: opens the folder of a distance of kind "classifier".

    Raises:
      ValueError: fewer samples than `prompts_per_step`, samples without an answer, a checkpoint of another
        configuration, several processes with overlap or another engine than the native one.
      NotFiniteError: loss or gradient is not finite.
      Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
    """
    began, workdir = time.monotonic(), Path(workdir)
    if len(samples) < config.prompts_per_step:
        raise ValueError(f"rl: {config.prompts_per_step} prompts_per_step, but there are only {len(samples)} samples")
    if jax.process_count() > 1 and (config.rollout.overlap or config.rollout.engine != "native"):
        raise ValueError(
            "rl: several processes must start the same work in the same order; set rollout.engine to native and "
            "rollout.overlap to False"
        )
    first = Prompt.of if environment is None else environment.prompt
    prompts = [first(i, sample, processor) for i, sample in enumerate(samples)]
    free = [name for name in FREE_TO_CHANGE if not (name == "checkpoint_every" and config.rollout.overlap)]
    identity = {
        "rl": {key: value for key, value in asdict(config).items() if key not in free},
        "model": asdict(model),
        "turns": 1 if environment is None else environment.max_turns,
        "data": {
            "prompts": fingerprint([prompt.rendered for prompt in prompts]),
            "answers": hashlib.sha256(repr([sample.answer for sample in samples]).encode()).hexdigest()[:16],
        },
    }
    parallel = Parallel.of(config.layout)
    shardings = None if parallel is None else qwen3_vl.shardings(model, parallel)
    if shardings is not None:
        params = jax.device_put(params, shardings)
    state = TrainState.create(params, config.optimizer, jax.random.key(config.seed), shardings)
    total, tokens, last = config.steps, 0, {}
    run = Run(
        workdir,
        identity,
        state,
        name,
        total,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep_checkpoints,
        updates_per_step=config.updates_per_rollout,
    )
    with run, _Loop(config, model, params, processor, prompts, workdir, engine, environment, load_classifier) as loop:
        state, done = run.state, run.done
        loop.position = Position(**run.extra.get("position", {}))
        while done < total:
            ends = run.due(done + 1)  # what is sampled next is to come from what is saved now
            state, values, count = loop.step(state, done, ahead=config.rollout.overlap and not ends)
            done, tokens = done + 1, tokens + count
            last = {**values, "tokens": count, "seconds": time.monotonic() - began}
            if evaluate and (done == total or (config.evaluate_every and done % config.evaluate_every == 0)):
                last |= evaluate(state.params)
            run.report(done, last, {key: last[key] for key in SHOWN}, count)
            if run.saves_after(done):
                run.save(done, state, {"position": asdict(loop.position)})
    return TrainResult(state.params, done, time.monotonic() - began, tokens, last)


@dataclass(frozen=True)
class _Ahead:
    """A rollout under way.

    Attributes:
      rollout: what comes of it.
      position: where the run stands once it has been used.
      version: steps that its weights had seen.
      transfer_seconds: it took to give the engine the weights.
    """

    rollout: Future[Rollout]
    position: Position
    version: int
    transfer_seconds: float


class _Loop(ExitStack):
    """What stays the same over the steps of a run, and where the run stands."""

    def __init__(
        self,
        config: RLConfig,
        model: ModelConfig,
        params: Params,
        processor: Processor,
        prompts: Sequence[Prompt],
        workdir: Path,
        engine: RolloutEngine | None,
        environment: Environment | None,
        load_classifier: Callable[[str], PairClassifier] | None,
    ):
        super().__init__()
        self.config, self.model, self.processor, self.prompts = config, model, processor, prompts
        self.workdir, self.position = workdir, Position()
        sizes = [size_of(prompt.rendered) for prompt in prompts]
        self.sampling = SamplingConfig(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            num_samples=config.samples_per_prompt,
            stop_token_ids=stop_token_ids(processor),
            repeat_window=config.rollout.repeat_window,
            repeat_count=config.rollout.repeat_count,
            repeat_length=config.rollout.repeat_length,
        )
        arrangement = {
            "responses": config.responses_per_update // config.micro_batches,
            "samples": config.samples_per_prompt,
            "per_row": config.responses_per_row,
            "max_new_tokens": config.max_new_tokens,
        }
        unit, self.play = schedule.draw_unit(config), None
        if environment is None:
            self.shape = policy_shape(sizes, model, **arrangement)
            shapes: dict[int, tuple[BatchShape, ...]] = {config.samples_per_prompt: (prompt_shape(sizes, unit, model),)}
        else:
            self.play = partial(play, environment=environment, processor=processor)
            self.shape = trajectory_shape(sizes, model, environment, **arrangement)
            shapes = turn_shapes(
                sizes, model, environment, prompts=unit, samples=config.samples_per_prompt,
                max_new_tokens=config.max_new_tokens,
            )  # fmt: skip
        self.parallel = Parallel.of(config.layout)
        check_batch(config.layout, self.shape.rows * config.layout.batch_shards, self.shape.length)
        self.place = placement(self.parallel, self.shape)
        self.loss = GSPOLoss.of(config, model, self.parallel)
        if engine is None:
            engine = NativeEngine(model, config.rollout, shapes, Parallel.of(config.rollout_layout))
            self.callback(engine.close)
        self.engine = engine
        self.rewarder: Rewarder = config.reward.build(config.max_new_tokens)
        self.callback(self.rewarder.close)
        diverse = config.advantage.estimator == "diversity"
        self.distance = config.advantage.distance.build(load_classifier) if diverse else None
        # What trains must see every update through itself; only a frozen encoder's features stay true.
        factors = jax.tree.leaves(multipliers(config.optimizer, params)["vision"])
        self.keep_pictures = not any(factors) and environment is None
        self.reference = _copy(params, config.dtype) if config.kl != "none" else None
        self.thread = self.enter_context(ThreadPoolExecutor(1, "rollout"))
        self.ahead: _Ahead | None = None

    def step(self, state: TrainState, number: int, *, ahead: bool) -> tuple[TrainState, dict[str, float], int]:
        """One rollout and its updates: (new state, metrics, tokens that passed the trainer).

        Args:
          number: of the step, from 0.
          ahead: whether to sample the next step's answers meanwhile.
        """
        config = self.config
        params = _cast(state.params, config.dtype)
        rolling, self.ahead = self.ahead or self.start(params, number, number), None
        rollout = rolling.rollout.result()
        phase = schedule.phase(config, self.position, number)
        correct = verdicts(rollout.groups)
        informative = schedule.informative(correct, config.advantage, phase)
        ratio = schedule.next_ratio(config.oversample, self.position.ratio, informative)
        self.position = replace(rolling.position, ratio=ratio, switched=self.position.switched)
        if ahead:
            # The update gives its buffers away; the engine keeps a copy of its own.
            self.ahead = self.start(_copy(params, config.dtype), number + 1, number)
        chosen = schedule.most_balanced(correct, informative, config.prompts_per_step)
        groups = [rollout.groups[i] for i in chosen]
        scores = self.advantages(groups, phase)
        batches = self.pack(groups, scores, rollout.pictures, chosen)
        began = time.monotonic()
        batches = self.with_logprobs(params, batches)
        compared = time.monotonic()
        del params

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
                raise NotFiniteError(save_bad_batch(self.workdir, number + 1, one, batch, rate))
            for key, value in with_pearson(one).items():
                values.setdefault(key, []).append(value)
        updated = time.monotonic()
        trained = {key: float(np.mean(value)) for key, value in values.items()}
        if phase == PASS_AT_K and trained["entropy"] < config.advantage.entropy_switch:
            self.position = replace(self.position, switched=True)
        if number in (0, config.steps - 1) or (config.show_every and (number + 1) % config.show_every == 0):
            show(self.workdir, number + 1, groups, scores)
        return (
            state,
            {
                **summary(rollout.groups),
                **self.rewarder.counters(),
                **trained,
                "informative": float(np.mean(informative)),
                "trained_informative": float(np.mean(informative[chosen])),
                "oversample": len(rollout.groups) / config.prompts_per_step,
                "phase": float(phase),
                "staleness": float(number - rolling.version),
                "learning_rate": rate,
                "rollout_seconds": rollout.sampling_seconds,
                "reward_seconds": rollout.reward_seconds,
                "logprob_seconds": compared - began,
                "update_seconds": updated - compared,
                "transfer_seconds": rolling.transfer_seconds,
            },
            sum(len(trajectory.rendered.tokens) for group in groups for trajectory in group.trajectories),
        )

    def start(self, params: Params, number: int, version: int) -> _Ahead:
        """Gives the engine the weights and lets it sample the answers of step `number`."""
        began = time.monotonic()
        self.engine.update(params, version)
        updated = time.monotonic()
        places, position = schedule.draw(self.config, self.position, len(self.prompts))
        rollout = self.thread.submit(
            roll_out,
            self.engine,
            self.processor,
            [self.prompts[i] for i in places],
            sampling=self.sampling,
            seed=self.config.seed,
            step=number,
            rewarder=self.rewarder,
            play=self.play,
            keep_pictures=self.keep_pictures,
        )
        return _Ahead(rollout, position, version, updated - began)

    def advantages(self, groups: Sequence[Group], phase: int) -> np.ndarray:
        """[G, N] float32."""
        config = self.config.advantage
        total = np.asarray([[score.total for score in group.scores] for group in groups])
        correct = np.asarray([[score.correct for score in group.scores] for group in groups])
        shaping = np.asarray([[score.shaping for score in group.scores] for group in groups])
        exclude = {
            "exclude_from_stats": self.excluded(groups, "stats"),
            "exclude_from_loss": self.excluded(groups, "loss"),
        }
        if phase == PASS_AT_K:
            return advantages.pass_at_k(verdicts(groups), config.k, **exclude) + advantages.centred(shaping, **exclude)
        if config.estimator == "group":
            return advantages.group(total, normalize_deviation=config.normalize_deviation, **exclude)
        if config.estimator == "rloo":
            return advantages.rloo(total, **exclude)
        if config.estimator == "batch":
            return advantages.batch(total, **exclude)
        assert self.distance is not None
        distance = np.stack([self.distance([t.text for t in group.trajectories]) for group in groups])
        factor = advantages.diversity_factor(
            distance, config.diversity_mode, exclude_from_stats=exclude["exclude_from_stats"]
        )
        return advantages.centred(correct * factor + shaping, **exclude)

    def excluded(self, groups: Sequence[Group], what: str) -> np.ndarray:
        """[G, N] which trajectories do not count in "loss" or "stats"."""
        flags = [
            flag
            for flag, where in (("cut", self.config.exclude_cut), ("overturn", self.config.exclude_overturn))
            if where in (what, "both")
        ]
        return np.asarray([[not t.flags.isdisjoint(flags) for t in group.trajectories] for group in groups])

    def pack(
        self, groups: Sequence[Group], scores: np.ndarray, pictures: Pictures | None, places: Sequence[int]
    ) -> list[PolicyBatch]:
        """For each update, its micro-batches stacked; `places` are those of the groups among the requests."""
        config, excluded = self.config, self.excluded(groups, "loss")
        rows = [None if pictures is None else pictures.rows[place] for place in places]
        responses = [
            Response(trajectory, float(scores[g, n]), not excluded[g, n], rows[g])
            for g, group in enumerate(groups)
            for n, trajectory in enumerate(group.trajectories)
        ]
        size = config.responses_per_update // config.micro_batches
        packed = [
            pack_responses(responses[start : start + size], self.shape, config.responses_per_row)
            for start in range(0, len(responses), size)
        ]
        updates, shards = [], config.layout.batch_shards
        for first in range(0, len(packed), config.micro_batches):
            of_update = packed[first : first + config.micro_batches]
            parts = {
                shard: jax.tree.map(lambda *x: np.stack(x), *of_update[shard::shards])
                for shard in (range(shards) if self.parallel is None else shards_of_process(self.parallel.mesh))
            }
            policy, sources = self.place(parts)
            updates.append(policy if pictures is None else read_pictures(policy, pictures, sources))
        return updates

    def with_logprobs(self, params: Params, batches: Sequence[PolicyBatch]) -> list[PolicyBatch]:
        """With what the loss compares to: the policy before the first of several updates, the reference of the KL."""
        config = self.config

        def of(params: Params, batch: PolicyBatch) -> Array:
            return trainer_logprobs(
                params, batch, model=self.model, temperature=config.temperature, remat=config.remat,
                parallel=self.parallel,
            )  # fmt: skip

        if config.updates_per_rollout > 1:
            batches = [replace(batch, logp_old=of(params, batch)) for batch in batches]
        if self.reference is not None:
            batches = [replace(batch, logp_reference=of(self.reference, batch)) for batch in batches]
        return jax.block_until_ready(list(batches))


def verdicts(groups: Sequence[Group]) -> np.ndarray:
    """[G, N] whether an answer is right, before any weight; 0 too where a gate took the reward for it away."""
    return np.asarray(
        [
            [part["correct"] if score.correct else 0.0 for part, score in zip(group.parts, group.scores, strict=True)]
            for group in groups
        ]
    )


def summary(groups: Sequence[Group]) -> dict[str, float]:
    """What a rollout says about the policy: rewards by part, pass@1, lengths, what was cut."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    parts = [part for group in groups for part in group.parts]
    correct = np.asarray([[part["correct"] for part in group.parts] for group in groups])
    names = dict.fromkeys(name for part in parts for name in part)  # a function of one's own may leave out a part
    return {
        "reward": float(np.mean([[score.total for score in group.scores] for group in groups])),
        **{f"reward_{name}": float(np.mean([part[name] for part in parts if name in part])) for name in names},
        "pass@1": float(correct.mean()),
        "pass@n": float(correct.max(axis=1).mean()),
        "length": float(np.mean([trajectory.policy_tokens for trajectory in trajectories])),
        **{
            flag: float(np.mean([flag in trajectory.flags for trajectory in trajectories]))
            for flag in ("cut", "redundant", "overturn", "invalid")
        },
    }


@partial(jax.jit, static_argnames="dtype")
def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _copy(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype, copy=True), params)


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


# Makes an engine that is not of this process: (config, model, parameters, processor) -> engine.
EngineFactory = Callable[[RLConfig, ModelConfig, Params, Processor], RolloutEngine]


def main(
    config: ConfigDict,
    workdir: Path,
    engines: Mapping[str, EngineFactory],
    load_classifier: Callable[[str], PairClassifier],
) -> None:
    """Trains a model on verifiable samples and writes the result, an HF folder, to `<workdir>/model`.

    Args:
      config: of an experiment of kind "rl".
      workdir: of the run.
      engines: by the names that `rollout.engine` can have beside "native".
      load_classifier: see `train`.
    """
    run = to_dataclass(RLRun, {key: value for key, value in config.items() if key != "kind"})
    samples = run.data.load()
    model, params, processor = open_model(run.model, samples, run.max_pixels, run.train.layout)
    with ExitStack() as stack:
        engine = None
        if run.train.rollout.engine != "native":
            engine = engines[run.train.rollout.engine](run.train, model, params, processor)
            stack.callback(engine.close)
        result = train(
            run.train, model, params, samples, processor, workdir, engine=engine, load_classifier=load_classifier
        )
    export(workdir / "model", model, result.params, processor)
    if is_first():
        print(f"{result.steps} steps; the model is in {workdir / 'model'}")
