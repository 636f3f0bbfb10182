"""Where a run stands beyond its parameters: which prompts come next, how many, and in which phase it is.

G groups, N answers each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mindjax.data.packing import epoch_order
from mindjax.rl.config import AdvantageConfig, OversampleConfig, RLConfig

PASS_AT_K, LATER = 0, 1


@dataclass(frozen=True)
class Position:
    """What a checkpoint holds beside the training state.

    Attributes:
      epoch, place: the next prompt, in the shuffle of that epoch.
      ratio: how many times `prompts_per_step` are asked next, before rounding.
      switched: whether the entropy has ended the Pass@k phase.
    """

    epoch: int = 0
    place: int = 0
    ratio: float = 1.0
    switched: bool = False


def phase(config: RLConfig, position: Position, step: int) -> int:
    """PASS_AT_K or LATER, of the step with this number, from 0."""
    first = not position.switched and step < config.advantage.pass_at_k * config.steps
    return PASS_AT_K if first else LATER


def draw(config: RLConfig, position: Position, total: int) -> tuple[list[int], Position]:
    """The places of the prompts to ask next, and where that leaves the run.

    Whole quarters of a step's prompts are drawn, so that few shapes are compiled. An epoch is a shuffle of all prompts,
    less what does not fill a draw: a prompt asked twice in one step would be answered twice alike.

    Args:
      total: how many prompts there are.
    """
    unit = draw_unit(config)
    count = min(math.ceil(config.prompts_per_step * position.ratio / unit) * unit, total // unit * unit)
    epoch, place = position.epoch, position.place
    if place + count > total:
        epoch, place = epoch + 1, 0
    order = epoch_order(total, seed=config.seed, epoch=epoch)
    return list(order[place : place + count]), replace(position, epoch=epoch, place=place + count)


def draw_unit(config: RLConfig) -> int:
    """Prompts that are asked together: all of a step; where their number changes a quarter, or one by one."""
    step = config.prompts_per_step
    if config.oversample.largest == 1:
        return step
    return step // 4 if step % 4 == 0 else 1


def informative(correct: np.ndarray, advantage: AdvantageConfig, phase: int) -> np.ndarray:
    """[G] whether a group has a lesson: right and wrong answers, for Pass@k no more than N - k right ones.

    Args:
      correct: [G, N], 1 for right; between 0 and 1 all that differs counts.
    """
    differs = (correct != correct[:, :1]).any(axis=1)
    if phase == LATER:
        return differs
    right = correct.sum(axis=1)
    return (right >= 1) & (right <= correct.shape[1] - advantage.k)


def next_ratio(config: OversampleConfig, ratio: float, informative: np.ndarray) -> float:
    """The moving average of 1 / (share of groups with a lesson), clamped (section 4.3 of the MindGPT-4ov report).

    Args:
      ratio: the average so far.
      informative: [G] of the groups that were asked last.
    """
    share = float(np.mean(informative))
    wanted = config.largest if share == 0 else min(max(1 / share, 1.0), config.largest)
    return config.decay * ratio + (1 - config.decay) * wanted


def most_balanced(correct: np.ndarray, informative: np.ndarray, count: int) -> list[int]:
    """The `count` groups to train, in their old order: those with a lesson first, then those nearest to half right.

    Args:
      correct: [G, N].
      informative: [G], see `informative`.
    """
    distance = np.abs(correct.mean(axis=1) - 0.5)
    best: Sequence[int] = sorted(range(len(correct)), key=lambda g: (not informative[g], distance[g], g))[:count]
    return sorted(best)
