"""Rollouts: prompts to sampled, scored groups of answers, and these to the packed rows that train.

P prompts, N answers each, B rows, T tokens in a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mindjax.config import ModelConfig
from mindjax.data.packing import BatchShape, SampleSize, pack
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered, append_completion, render
from mindjax.inference.sampler import SamplingConfig, generate, prompt_shape, sampling_keys
from mindjax.rl.rewards import RewardFn, total
from mindjax.types import Array, Batch, Completion, Sample

Params = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A sample as the policy sees it.

    Attributes:
      index: its place in the data set, part of the sampling keys.
      sample: what rewards look at.
      rendered: the conversation without its last reply, ready to be continued.
    """

    index: int
    sample: Sample
    rendered: Rendered


@dataclass(frozen=True)
class Group:
    """The scored answers to one prompt.

    Attributes:
      prompt: what was asked.
      completions: [N] what was sampled.
      texts: [N] the same, see `reply_text`.
      parts: [N] rewards by name.
      rewards: [N] their weighted sums.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    texts: tuple[str, ...]
    parts: tuple[Mapping[str, float], ...]
    rewards: tuple[float, ...]

    @property
    def correct(self) -> np.ndarray:
        """[N] 0 or 1."""
        return np.asarray([part["correct"] for part in self.parts], np.float32)

    @property
    def informative(self) -> bool:
        """Whether there are right and wrong answers to learn from; other rewards do not count."""
        return bool((self.correct != self.correct[0]).any())


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
    """

    batch: Batch
    response_ids: Array
    advantages: Array
    logp_rollout: Array
    logp_old: Array | None = None


def render_prompt(sample: Sample, processor: Processor) -> Rendered:
    """The sample's conversation up to its last reply, which is left out, with the header of a new one.

    Raises:
      ValueError: nothing is left to answer.
    """
    messages = sample.messages[:-1] if sample.messages[-1].get("role") == "assistant" else sample.messages
    if not messages:
        raise ValueError(f"sample {sample.id!r} holds no message to answer")
    return render(messages, processor, add_generation_prompt=True)


def roll_out(
    params: Params,
    config: ModelConfig,
    processor: Processor,
    prompts: Sequence[Prompt],
    *,
    sampling: SamplingConfig,
    seed: int,
    step: int,
    rewards: RewardFn,
    weights: Mapping[str, float],
    shape: BatchShape,
) -> list[Group]:
    """Samples `sampling.num_samples` answers to each prompt and scores them.

    Args:
      params, config, processor: the policy.
      prompts: in any order; an answer depends on (seed, step, prompt index, its number) and the parameters alone.
      sampling: see `SamplingConfig`; temperature 1 or that of training, without top_k and top_p.
      seed, step: of the run, for the keys.
      rewards, weights: see `mindjax.rl.rewards`.
      shape: of a prefill batch, see `prompt_shape`.
    """
    keys = sampling_keys(seed, step, [prompt.index for prompt in prompts], sampling.num_samples)
    rendered = [prompt.rendered for prompt in prompts]
    answers = generate(params, config, rendered, sampling=sampling, keys=keys, shape=shape)
    groups = []
    for prompt, completions in zip(prompts, answers, strict=True):
        texts = [reply_text(c, processor) for c in completions]
        parts = [
            dict(rewards(prompt.sample, text, len(c.token_ids))) for text, c in zip(texts, completions, strict=True)
        ]
        scores = tuple(total(part, weights) for part in parts)
        groups.append(Group(prompt, tuple(completions), tuple(texts), tuple(parts), scores))
    return groups


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


def pack_responses(
    responses: Sequence[tuple[Rendered, Completion, float]], shape: BatchShape, per_row: int
) -> PolicyBatch:
    """Lays answers, each after its prompt, into rows of `per_row`; what was sampled is trained on token by token.

    Args:
      responses: (prompt, completion, advantage), those of one prompt side by side; at most `shape.rows * per_row`.
      shape: from `policy_shape`.
      per_row: responses in a row.
    """
    full = [append_completion(prompt, completion.token_ids) for prompt, completion, _ in responses]
    batch = pack([full[start : start + per_row] for start in range(0, len(full), per_row)], shape)
    response_ids: Any = np.zeros(batch.tokens.shape, np.int32)
    logp_rollout: Any = np.zeros(batch.tokens.shape, np.float32)
    advantages: Any = np.zeros(shape.rows * per_row, np.float32)
    for number, (_, completion, advantage) in enumerate(responses):
        row, segment = divmod(number, per_row)
        sampled = (np.asarray(batch.segment_ids[row]) == segment + 1) & (np.asarray(batch.loss_mask[row]) > 0)
        response_ids[row, sampled] = number + 1
        logp_rollout[row, sampled] = completion.logprobs
        advantages[number] = advantage
    return PolicyBatch(batch, response_ids, advantages, logp_rollout)
