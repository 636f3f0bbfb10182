"""Verifiers, rewards and group advantages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mindjax.rl import advantages
from mindjax.rl.rewards import RewardConfig, length_reward, total
from mindjax.rl.verifiers import verify
from mindjax.types import Sample


@pytest.mark.parametrize(
    ("reply", "answer", "expected"),
    [
        ("red", {"kind": "exact", "value": "red"}, 1.0),
        (" Red. ", {"kind": "exact", "value": "red"}, 1.0),
        ("blue", {"kind": "exact", "value": "red"}, 0.0),
        ("007", {"kind": "exact", "value": "007"}, 1.0),
        ("7", {"kind": "exact", "value": "007"}, 0.0),
        (r"so \boxed{7}", {"kind": "exact", "value": "7", "boxed": True}, 1.0),
        ("7", {"kind": "exact", "value": "7", "boxed": True}, 0.0),
        ("4", {"kind": "one_of", "value": ["3", "4"]}, 1.0),
        ("47", {"kind": "within", "value": 50, "tolerance": 3}, 1.0),
        ("46", {"kind": "within", "value": 50, "tolerance": 3}, 0.0),
        ("", {"kind": "exact", "value": "red"}, 0.0),
    ],
)
def test_verify(reply: str, answer: dict[str, object], expected: float) -> None:
    assert verify(reply, answer) == expected


def test_verify_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(ValueError, match="no answer"):
        verify("red", None)
    with pytest.raises(ValueError, match="not known"):
        verify("red", {"kind": "poem", "value": "red"})


def test_length_reward_is_equation_10() -> None:
    lengths = [0, 6, 7, 8, 9, 10, 11, 500]
    expected = [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0, -1.0]
    assert [length_reward(n, longest=10, soft=4) for n in lengths] == expected


def test_composition() -> None:
    config = RewardConfig(correct=2.0, length=0.5, soft_length=4)
    fn = config.function(10)
    sample = Sample((), "a", answer={"kind": "exact", "value": "red"})
    parts = fn(sample, "red", 8)
    assert parts == {"correct": 1.0, "length": -0.5} and total(parts, config.weights()) == 1.75
    assert RewardConfig().function(10)(sample, "red", 10) == {"correct": 1.0}
    with pytest.raises(ValueError, match="name both alike"):
        total({"correct": 1.0}, config.weights())
    with pytest.raises(ValueError, match="soft_length must be positive"):
        RewardConfig(length=0.5)
    with pytest.raises(ValueError, match="more than the longest"):
        RewardConfig(length=0.5, soft_length=11).function(10)
    assert RewardConfig(length=0.5, soft_length=4, max_length=8).function(10)(sample, "red", 6)["length"] == -0.5


def test_group_advantages() -> None:
    rewards = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    plain = advantages.group(rewards, normalize_deviation=False)
    np.testing.assert_allclose(plain, [[0.75, -0.25, -0.25, -0.25], [0] * 4, [0] * 4])
    scaled = advantages.group(rewards, normalize_deviation=True)
    np.testing.assert_allclose(scaled[0], np.array([3, -1, -1, -1]) / np.sqrt(3), rtol=1e-6)
    assert not scaled[1:].any() and scaled.dtype == np.float32


@settings(max_examples=50, deadline=None)
@given(
    rewards=arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 8)), elements=st.floats(-10, 10, width=32)),
    normalize=st.booleans(),
)
def test_group_advantages_properties(rewards: np.ndarray, normalize: bool) -> None:
    result = advantages.group(rewards, normalize_deviation=normalize)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result.sum(axis=1), 0, atol=1e-4)
    equal = (rewards == rewards[:, :1]).all(axis=1)
    assert not result[equal].any()
    np.testing.assert_array_equal(
        advantages.group(rewards[:, ::-1], normalize_deviation=normalize)[:, ::-1].round(3), result.round(3)
    )


def test_group_advantages_refuse_bad_input() -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        advantages.group(np.ones((3, 1)), normalize_deviation=True)
    with pytest.raises(ValueError, match=r"not finite at \[group, answer\] \[\[0, 1\]\]"):
        advantages.group(np.array([[0.0, np.nan]]), normalize_deviation=True)
    with pytest.raises(ValueError, match="groups, answers"):
        advantages.group(np.ones(3), normalize_deviation=True)
    # A mean of equal rewards may round: 0.1 * 3 / 3 is not 0.1.
    assert not advantages.group(np.full((1, 3), 0.1), normalize_deviation=True).any()
