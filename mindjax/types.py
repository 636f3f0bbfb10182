"""The arrays that pass between the parts: one batch, one rollout, one loss.

Shape suffixes used throughout: B rows, T tokens in a row, R vision rows, L patches in a vision row,
P patch pixels (channels x temporal x height x width), V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VisionInputs:
    """Patches of all images and frames of a batch, packed into rows; attention stays inside a segment.

    Attributes:
      patches: [R, L, P] normalised pixels, in the merge-block order of the processor, so that every
        `spatial_merge_size**2` neighbours become one token.
      coordinates: [R, L, 4] int32, (row, column, grid height, grid width) of each patch, in patches.
      segment_ids: [R, L] int32, one number per image or frame, 0 for padding.
    """

    patches: Array
    coordinates: Array
    segment_ids: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Packed rows of rendered conversations.

    Attributes:
      tokens: [B, T] int32.
      positions: [B, T, 3] int32, M-RoPE (time, height, width); they restart with each segment.
      segment_ids: [B, T] int32, one number per conversation in the row, 0 for padding.
      loss_mask: [B, T] float32, 1 where `tokens[b, t]` is a target (predicted from t - 1).
      vision_index: [B, T] int32, which merged vision token (flat, over R x L / merge**2) stands at this
        place, -1 where the place holds text.
      vision: the patches, or None for a batch of text alone.
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    loss_mask: Array
    vision_index: Array
    vision: VisionInputs | None = None

    def shifted(self, shard: int, merge_size: int) -> Batch:
        """As shard number `shard` of a larger batch whose shards have equal shapes; `vision_index` counts over all."""
        if self.vision is None or not shard:
            return self
        rows, length = self.vision.patches.shape[-3:-1]
        offset = shard * (rows * length // merge_size**2)
        index: Any = np.where(self.vision_index >= 0, self.vision_index + offset, -1)
        return replace(self, vision_index=index)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossOutput:
    """A loss as a sum and its count, so that partial losses add up to one exact mean.

    Attributes:
      sum: scalar float32, the summed loss; its gradient is what accumulates.
      count: scalar float32, what to divide by once everything is summed.
      metrics: name -> (sum, count) pairs, reported as sum / count.
      maxima: name -> scalar, of which the largest is reported.
    """

    sum: Array
    count: Array
    metrics: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    maxima: dict[str, Array] = field(default_factory=dict)

    @property
    def mean(self) -> Array:
        """The mean, 0 where nothing was counted."""
        return self.sum / jnp.maximum(self.count, 1.0)


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
      token_ids: the generated tokens, the stop token included when one was sampled.
      logprobs: their log-probabilities under the distribution they were sampled from.
      finish_reason: "stop", "length", or "redundant" where the answer went round in circles and was cut.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


@dataclass(frozen=True)
class Segment:
    """A stretch of a trajectory by one author.

    Attributes:
      author: "policy" for what was sampled, "environment" for what a tool or a user answered. The prompt is no segment.
      text: what it says, the token that ends the turn left out; any other control token stays visible.
      token_ids: as sampled, or as rendered.
      logprobs: of the policy's tokens, under the distribution they were sampled from; () for the environment.
    """

    author: Literal["policy", "environment"]
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """What came of one prompt: one turn of the policy, or several with an environment's answers between them.

    Attributes:
      segments: in order; the last one is the policy's.
      rendered: `mindjax.data.render.Rendered`, the prompt and all segments as one sequence, positions and images
        included; its `loss_mask` is 1 on the policy's tokens alone.
      logprobs: [T] float32, those of the rollout at the policy's tokens, 0 elsewhere.
      flags: of "cut" (stopped by its length), "redundant" (went round in circles), "overturn" (used all its turns
        without an end), "invalid" (asked a tool for something it cannot do), "stale" (sampled from older weights).
    """

    segments: tuple[Segment, ...]
    rendered: Any
    logprobs: Any
    flags: frozenset[str] = frozenset()

    @property
    def text(self) -> str:
        """The policy's last words, which hold its answer."""
        return self.segments[-1].text

    @property
    def policy_tokens(self) -> int:
        """How many tokens the policy wrote."""
        return sum(len(segment.token_ids) for segment in self.segments if segment.author == "policy")


@dataclass(frozen=True)
class Sample:
    """One conversation with what is needed to train on it, judge it, or prefer it.

    Attributes:
      messages: HF chat messages; image parts are {"type": "image", "image": path, PIL image or uint8 array}.
      id: unique and stable over runs.
      task: the family it belongs to; rewards are routed and accuracies reported by it.
      answer: what a verifier needs to judge a reply, {"kind": ..., ...}; None where nothing is verifiable.
      rejected: for preference data, the reply that loses to the last assistant message.
      difficulty: higher is harder; compared among samples of one task alone.
    """

    messages: tuple[dict[str, Any], ...]
    id: str
    task: str = ""
    answer: dict[str, Any] | None = None
    rejected: str | None = None
    difficulty: float = 0.0
