"""Which prompts come when, how many, and in which phase."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mindjax.rl.config import AdvantageConfig, OversampleConfig, RLConfig
from mindjax.rl.schedule import (
    LATER,
    PASS_AT_K,
    Position,
    draw,
    informative,
    most_balanced,
    next_ratio,
    phase,
)

CONFIG = RLConfig(steps=10, prompts_per_step=4, samples_per_prompt=4)


def drawn(config: RLConfig, steps: int, total: int = 9, ratio: float = 1.0) -> list[list[int]]:
    position, result = Position(ratio=ratio), []
    for _ in range(steps):
        places, position = draw(config, position, total)
        result.append(places)
    return result


def test_every_prompt_comes_at_most_once_an_epoch() -> None:
    epochs = drawn(CONFIG, 6)
    for first, second in zip(epochs[::2], epochs[1::2], strict=True):
        assert len({*first, *second}) == 8
    assert epochs[0] != epochs[2] and drawn(replace(CONFIG, seed=1), 1) != epochs[:1]


def test_more_prompts_are_drawn_in_quarters() -> None:
    config = replace(CONFIG, oversample=OversampleConfig(largest=4.0))
    assert [len(places) for ratio in (1.0, 1.1, 2.0, 4.0) for places in drawn(config, 1, 40, ratio)] == [4, 5, 8, 16]
    assert len(drawn(config, 1, 9, 4.0)[0]) == 9, "never one prompt twice"
    assert len(drawn(replace(config, prompts_per_step=9), 1, 9, 1.0)[0]) == 9, "never fewer than are trained"


def test_phases_end_by_share_or_by_entropy() -> None:
    config = replace(CONFIG, advantage=AdvantageConfig(pass_at_k=0.3, k=2))
    assert [phase(config, Position(), step) for step in range(5)] == [PASS_AT_K] * 3 + [LATER] * 2
    assert phase(config, Position(switched=True), 0) == LATER
    assert phase(CONFIG, Position(), 0) == LATER


def test_lessons_of_a_group() -> None:
    """With k of 2 and 4 answers, three right ones leave no pair of wrong ones: every pair has a right one."""
    correct = np.asarray([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], float)
    config = AdvantageConfig(pass_at_k=1.0, k=2)
    assert informative(correct, config, PASS_AT_K).tolist() == [False, True, True, False, False]
    assert informative(correct, config, LATER).tolist() == [False, True, True, True, False]


def test_ratio_is_a_moving_average_of_what_was_needed() -> None:
    config = OversampleConfig(largest=3.0, decay=0.5)
    quarter, none = np.asarray([True, False, False, False]), np.zeros(4, bool)
    assert next_ratio(config, 1.0, np.asarray([True, False])) == pytest.approx(0.5 * 1 + 0.5 * 2)
    assert next_ratio(config, 1.0, quarter) == pytest.approx(0.5 * 1 + 0.5 * 3), "4 is more than allowed"
    assert next_ratio(config, 2.0, none) == pytest.approx(2.5)
    assert next_ratio(OversampleConfig(), 1.0, none) == 1.0


def test_the_most_balanced_groups_are_kept_in_order() -> None:
    correct = np.asarray([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], float)
    lessons = informative(correct, AdvantageConfig(), LATER)
    assert most_balanced(correct, lessons, 1) == [2]
    assert most_balanced(correct, lessons, 3) == [0, 2, 3]
    assert most_balanced(correct, lessons, 4) == [0, 1, 2, 3], "without a lesson only where nothing else is left"
    pass_at_k = informative(correct, AdvantageConfig(pass_at_k=1.0, k=2), PASS_AT_K)
    assert most_balanced(correct, pass_at_k, 2) == [2, 3], "three right of four teach nothing there"
