"""Rollouts: prompts to sampled, scored groups of answers, and these to the packed rows that train.

P prompts, N answers each, B rows, T tokens in a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.config import ModelConfig
from mindjax.data.packing import BatchShape, SampleSize, pack
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered, append_completion, render
from mindjax.inference.sampler import SamplingConfig, prompt_shape, sampling_keys
from mindjax.models.vision import VisionFeatures
from mindjax.rl.engine import NativeEngine, Pictures, RolloutEngine
from mindjax.rl.rewards import Rewarder, Scored
from mindjax.types import Array, Batch, Completion, Sample, Segment, Trajectory
from sharding.processes import from_first

Params = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A sample as the policy sees it.

    Attributes:
      index: its place in the data set, part of the sampling keys.
      sample: what rewards look at.
      rendered: the conversation without its last reply, ready to be continued.
      images: its pictures in order.
    """

    index: int
    sample: Sample
    rendered: Rendered
    images: tuple[Any, ...] = ()

    @classmethod
    def of(cls, index: int, sample: Sample, processor: Processor) -> Prompt:
        """The sample's conversation up to its last reply, which is left out, with the header of a new one.

        Raises:
          ValueError: nothing is left to answer.
        """
        messages = sample.messages[:-1] if sample.messages[-1].get("role") == "assistant" else sample.messages
        if not messages:
            raise ValueError(f"sample {sample.id!r} holds no message to answer")
        parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
        images = tuple(part.get("image", part.get("path")) for part in parts if part["type"] == "image")
        return cls(index, sample, render(messages, processor, add_generation_prompt=True), images)


@dataclass(frozen=True)
class Group:
    """The scored answers to one prompt.

    Attributes:
      prompt: what was asked.
      trajectories: [N] what came of it.
      parts: [N] rewards by name.
      scores: [N] the same, weighted.
    """

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    parts: tuple[dict[str, float], ...]
    scores: tuple[Scored, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyBatch:
    """Packed answers; a response's number is its place in the micro-batch plus 1.

    Attributes:
      batch: the rows; `loss_mask` is 1 on sampled tokens.
      response_ids: [B, T] int32, 0 outside of sampled tokens.
      advantages: [responses] float32.
      logp_rollout: [B, T] float32, as reported by the sampler.
      logp_old: [B, T] float32, of the trainer's own forward before the first update on this rollout; None where that
        is the only update, and the log-probabilities being trained are the old ones.
      logp_reference: [B, T] float32, of the policy that the KL term holds on to; None without one.
      vision_features: of the pictures in `batch.vision`'s layout, where they have been encoded before; `batch.vision`
        is None then.
    """

    batch: Batch
    response_ids: Array
    advantages: Array
    logp_rollout: Array
    logp_old: Array | None = None
    logp_reference: Array | None = None
    vision_features: VisionFeatures | None = None

    def shifted(self, shard: int, merge_size: int) -> PolicyBatch:
        """As shard number `shard` of a larger batch whose shards have equal shapes; responses are numbered over all.

        Raises:
          ValueError: pictures were read into the batch before; they are read when all shards are together.
        """
        if self.vision_features is not None:
            raise ValueError("place the shards of a batch first, and then `read_pictures`")
        if not shard:
            return self
        offset = shard * self.advantages.shape[-1]
        ids: Any = np.where(self.response_ids > 0, self.response_ids + offset, 0)
        return replace(self, batch=self.batch.shifted(shard, merge_size), response_ids=ids)


@dataclass(frozen=True)
class Rollout:
    """The groups of one step.

    Attributes:
      groups: in the order that they were asked.
      pictures: of their prompts, where they were encoded to be trained on too.
      sampling_seconds, reward_seconds: what it took.
    """

    groups: tuple[Group, ...]
    pictures: Pictures | None
    sampling_seconds: float
    reward_seconds: float


# Plays the conversations of prompts with an environment: `num_samples` trajectories each.
Play = Callable[[RolloutEngine, Sequence[Prompt], SamplingConfig, int, int], list[list[Trajectory]]]


def roll_out(
    engine: RolloutEngine,
    processor: Processor,
    prompts: Sequence[Prompt],
    *,
    sampling: SamplingConfig,
    seed: int,
    step: int,
    rewarder: Rewarder,
    play: Play | None = None,
    keep_pictures: bool = False,
) -> Rollout:
    """Samples `sampling.num_samples` answers to each prompt and scores them.

    Args:
      engine: holds the policy.
      processor: decodes.
      prompts: in any order; an answer depends on (seed, step, prompt index, its number) and the parameters alone.
      sampling: see `SamplingConfig`; temperature 1 or that of training, without top_k and top_p.
      seed, step: of the run, for the keys.
      rewarder: scores.
      play: for conversations of several turns; None for a single answer.
      keep_pictures: whether the trainer wants the features of the pictures, with a native engine and single answers.
    """
    began, pictures = time.monotonic(), None
    if play is None:
        keys = sampling_keys(seed, step, [prompt.index for prompt in prompts], sampling.num_samples)
        rendered = [prompt.rendered for prompt in prompts]
        if keep_pictures and isinstance(engine, NativeEngine):
            pictures = engine.encode(rendered, sampling.num_samples)
            answers = engine.generate(rendered, sampling, keys, pictures)
        else:
            answers = engine.generate(rendered, sampling, keys)
        played = [
            [single_turn(prompt.rendered, completion, processor) for completion in completions]
            for prompt, completions in zip(prompts, answers, strict=True)
        ]
    else:
        played = play(engine, prompts, sampling, seed, step)
    sampled = time.monotonic()
    # One process judges for all: a verifier's timeout may strike in one and not in another.
    judged = from_first(
        lambda: [
            [rewarder.parts(trajectory, prompt.sample) for trajectory in trajectories]
            for prompt, trajectories in zip(prompts, played, strict=True)
        ]
    )
    groups = [
        Group(prompt, tuple(trajectories), tuple(parts), tuple(rewarder.combine(part, prompt.sample) for part in parts))
        for prompt, trajectories, parts in zip(prompts, played, judged, strict=True)
    ]
    return Rollout(tuple(groups), pictures, sampled - began, time.monotonic() - sampled)


# What `Completion.finish_reason` says of a trajectory.
FLAG_OF_FINISH = {"stop": (), "length": ("cut",), "redundant": ("redundant",)}


def single_turn(prompt: Rendered, completion: Completion, processor: Processor) -> Trajectory:
    """One answer as a trajectory."""
    segment = Segment("policy", reply_text(completion, processor), completion.token_ids, completion.logprobs)
    logprobs = np.zeros(len(prompt.tokens) + len(completion.token_ids), np.float32)
    logprobs[len(prompt.tokens) :] = completion.logprobs
    flags = frozenset(FLAG_OF_FINISH[completion.finish_reason])
    return Trajectory((segment,), append_completion(prompt, completion.token_ids), logprobs, flags)


def reply_text(completion: Completion, processor: Processor) -> str:
    """What is judged: the tokens before the <|im_end|> that ends the turn. Any other control token stays visible, so
    that it is as wrong as any other wrong word."""
    tokens = completion.token_ids
    if tokens and tokens[-1] == processor.im_end_token_id:
        tokens = tokens[:-1]
    return processor.tokenizer.decode(tokens, skip_special_tokens=False)


def policy_shape(
    sizes: Sequence[SampleSize], config: ModelConfig, *, responses: int, samples: int, per_row: int, max_new_tokens: int
) -> BatchShape:
    """The shape of a training micro-batch that holds any `responses` answers, so that it is compiled once.

    Args:
      sizes: of all prompts.
      config: of the model.
      responses: in a micro-batch, those of a prompt side by side.
      samples: answers per prompt.
      per_row: responses in a row.
      max_new_tokens: of an answer.
    """
    # A group that straddles two micro-batches brings its images to both.
    prompts = responses // samples if responses % samples == 0 else math.ceil(responses / samples) + 1
    vision = prompt_shape(sizes, prompts, config)
    longest = max(size.tokens for size in sizes) + max_new_tokens
    return BatchShape(
        rows=math.ceil(responses / per_row),
        length=-(-per_row * longest // 16) * 16,
        vision_rows=vision.vision_rows,
        vision_length=vision.vision_length,
        patch_dim=vision.patch_dim,
        merge_size=vision.merge_size,
    )


@dataclass(frozen=True)
class Response:
    """A trajectory on its way into a micro-batch.

    Attributes:
      trajectory: what was sampled.
      advantage: of all its tokens.
      counts: whether it has a part in the loss.
      picture_rows: of its prompt, in the table of `Pictures`; None without one.
    """

    trajectory: Trajectory
    advantage: float
    counts: bool = True
    picture_rows: np.ndarray | None = None


def pack_responses(responses: Sequence[Response], shape: BatchShape, per_row: int) -> tuple[PolicyBatch, np.ndarray]:
    """Lays answers, each after its prompt, into rows of `per_row`; what was sampled is trained on token by token.

    Args:
      responses: those of one prompt side by side; at most `shape.rows * per_row`.
      shape: from `policy_shape`.
      per_row: responses in a row.

    Returns:
      (the batch, [M] int32: for each merged vision token of the batch, its row in the table of `Pictures`).
    """
    full = [response.trajectory.rendered for response in responses]
    batch = pack([full[start : start + per_row] for start in range(0, len(full), per_row)], shape)
    response_ids: Any = np.zeros(batch.tokens.shape, np.int32)
    logp_rollout: Any = np.zeros(batch.tokens.shape, np.float32)
    advantages: Any = np.zeros(shape.rows * per_row, np.float32)
    sources: Any = np.zeros(shape.vision_rows * shape.vision_length // shape.merge_size**2, np.int32)
    loss_mask, vision_index = np.asarray(batch.loss_mask), np.asarray(batch.vision_index)
    for number, response in enumerate(responses):
        row, segment = divmod(number, per_row)
        mine = np.asarray(batch.segment_ids[row]) == segment + 1
        if response.picture_rows is not None:
            sources[vision_index[row, mine & (vision_index[row] >= 0)]] = response.picture_rows
        sampled = mine & (loss_mask[row] > 0)
        if not response.counts:
            loss_mask[row, sampled] = 0.0
            continue
        response_ids[row, sampled] = number + 1
        logp_rollout[row, sampled] = response.trajectory.logprobs[response.trajectory.rendered.loss_mask > 0]
        advantages[number] = response.advantage
    return PolicyBatch(batch, response_ids, advantages, logp_rollout), sources


def read_pictures(policy: PolicyBatch, pictures: Pictures, sources: np.ndarray) -> PolicyBatch:
    """The stacked micro-batches with features of the table in the place of patches.

    Args:
      policy: stacked, leaves [micro_batches, ...].
      sources: [micro_batches, M], see `pack_responses`.
    """
    return replace(policy, batch=replace(policy.batch, vision=None), vision_features=_gather(pictures.table, sources))


@jax.jit
def _gather(table: VisionFeatures, sources: Array) -> VisionFeatures:
    return VisionFeatures(table.tokens[sources], jnp.moveaxis(table.deepstack[:, sources], 1, 0))
