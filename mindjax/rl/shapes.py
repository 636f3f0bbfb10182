"""Batch shapes of conversations with an environment, known before the first step, so that the steps compile nothing.

P prompts, N trajectories of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mindjax.config import ModelConfig
from mindjax.data.packing import BatchShape, SampleSize, bucket

if TYPE_CHECKING:
    from mindjax.data.render import Rendered
    from mindjax.rl.environments import Environment


def turn_shapes(
    sizes: Sequence[SampleSize],
    config: ModelConfig,
    environment: Environment,
    *,
    prompts: int,
    samples: int,
    max_new_tokens: int,
) -> dict[int, tuple[BatchShape, ...]]:
    """Prefill shapes that hold every turn of a rollout, by the number of samples that a call asks for.

    In the first turn a row is a prompt with N samples; in later ones it is a trajectory with one, and there are always
    P x N rows, however many trajectories are still live. `smallest` chooses among them.

    Args:
      sizes: of all prompts.
      config: of the model.
      environment: bounds what comes later.
      prompts, samples: of a rollout.
      max_new_tokens: of a turn.

    Returns:
      Samples per request -> shapes, from the smallest to the largest.
    """
    shapes: dict[int, list[BatchShape]] = {}
    for turn in range(environment.max_turns):
        rows = prompts * samples if turn else prompts
        length = bucket(_longest(sizes, environment, turn, max_new_tokens))
        shape = _shape(sizes, config, environment, rows, length, prompts, rows * turn)
        shapes.setdefault(1 if turn else samples, []).append(shape)
    return {number: tuple(dict.fromkeys(found)) for number, found in shapes.items()}


def trajectory_shape(
    sizes: Sequence[SampleSize],
    config: ModelConfig,
    environment: Environment,
    *,
    responses: int,
    samples: int,
    per_row: int,
    max_new_tokens: int,
) -> BatchShape:
    """The shape of a training micro-batch of any `responses` trajectories, as `mindjax.rl.rollout.policy_shape`."""
    # A group that straddles two micro-batches brings its images to both.
    prompts = responses // samples if responses % samples == 0 else math.ceil(responses / samples) + 1
    later = environment.max_turns - 1
    longest = _longest(sizes, environment, later, max_new_tokens) + max_new_tokens
    length = -(-per_row * longest // 16) * 16
    return _shape(sizes, config, environment, math.ceil(responses / per_row), length, prompts, responses * later)


def smallest(shapes: Sequence[BatchShape], prompts: Sequence[Rendered]) -> BatchShape:
    """The first of rising shapes that holds the prompts; the last one where that is not sure."""
    tokens = max(len(prompt.tokens) for prompt in prompts)
    frames = {id(patches): len(patches) for prompt in prompts for patches, _ in prompt.frames}  # packed once each
    largest = max(frames.values(), default=0)
    for shape in shapes:
        room = shape.vision_rows * (shape.vision_length // largest) if largest else 0
        if tokens <= shape.length and len(prompts) <= shape.rows and len(frames) <= room:
            return shape
    return shapes[-1]


def _longest(sizes: Sequence[SampleSize], environment: Environment, turn: int, max_new_tokens: int) -> int:
    """Tokens before a turn of the policy, at most."""
    return max(size.tokens for size in sizes) + turn * (max_new_tokens + environment.largest_message.tokens)


def _shape(
    sizes: Sequence[SampleSize],
    config: ModelConfig,
    environment: Environment,
    rows: int,
    length: int,
    prompts: int,
    messages: int,
) -> BatchShape:
    """Room for the pictures of so many prompts, each once, and of so many messages."""
    patch_dim, merge = config.vision.patch_dim, config.vision.spatial_merge_size
    first = max((frame for size in sizes for frame in size.frames), default=0)
    later = environment.largest_message.frames
    kinds = [
        (first, prompts * max(len(size.frames) for size in sizes)),
        (max(later, default=0), messages * len(later)),
    ]
    kinds = [(size, count) for size, count in kinds if size and count]
    if not kinds:
        return BatchShape(rows, length, patch_dim=patch_dim, merge_size=merge)
    vision_length = bucket(max(size for size, _ in kinds), 4 * config.vision.merge_unit)
    vision_rows = bucket(sum(math.ceil(count / (vision_length // size)) for size, count in kinds), 1)
    return BatchShape(rows, length, vision_rows, vision_length, patch_dim, merge)
