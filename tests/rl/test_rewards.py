"""Rewards by name, and how weights, gates and routes put them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindjax.experiment import to_dataclass
from mindjax.rl.rewards import RewardConfig, length_reward, repetition_reward
from mindjax.types import Sample, Segment, Trajectory

RED = Sample((), "a", "colour", {"kind": "exact", "value": "red"})
BOX = Sample((), "b", "locate", {"kind": "box", "value": [0, 0, 10, 10]})


def said(text: str, tokens: int | tuple[int, ...] = 1, *flags: str) -> Trajectory:
    ids = tuple(range(tokens)) if isinstance(tokens, int) else tokens
    return Trajectory((Segment("policy", text, ids, (0.0,) * len(ids)),), None, None, frozenset(flags))


def brevity(trajectory: Trajectory, sample: Sample) -> Mapping[str, float]:
    """A reward of one's own, named by path in a config."""
    return {"brevity": 1 / trajectory.policy_tokens, "known": float(sample.task == "colour")}


def vowels(trajectory: Trajectory, sample: Sample) -> Mapping[str, float]:
    return {"correct": sum(c in "aeiou" for c in trajectory.text) / len(trajectory.text)}


def named_twice(trajectory: Trajectory, sample: Sample) -> Mapping[str, float]:
    return {"known": 0.0}


def hides_length(trajectory: Trajectory, sample: Sample) -> Mapping[str, float]:
    return {"length": 1.0}


def own(name: str) -> str:
    return f"{__name__}:{name}"


def test_length_reward_is_equation_10() -> None:
    lengths = [0, 6, 7, 8, 9, 10, 11, 500]
    expected = [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0, -1.0]
    assert [length_reward(n, longest=10, soft=4) for n in lengths] == expected


def test_only_what_has_a_weight_is_computed() -> None:
    rewarder = RewardConfig().build(10)
    assert rewarder.parts(said("red", 10, "redundant", "cut"), RED) == {"correct": 1.0}
    scored = rewarder.combine({"correct": 1.0}, RED)
    assert (scored.correct, scored.shaping, scored.total) == (1.0, 0.0, 1.0)


def test_every_part() -> None:
    config = RewardConfig(
        correct=2.0, length=0.5, soft_length=4, format=0.25, repetition=1.0, repetition_ngram=2, redundant=3.0, iou=1.0
    )
    rewarder = config.build(10)
    looped = said(r"\boxed{red}", (1, 2, 1, 2, 1, 2, 1, 2), "redundant")
    parts = rewarder.parts(looped, RED)
    # 7 pairs, two of them different; 8 tokens of 10, half of the way from 6; the box of a colour overlaps nothing.
    expected = {"correct": 1, "length": -0.5, "format": 1, "repetition": 2 / 7 - 1, "redundant": -1, "iou": 0}
    assert parts == pytest.approx(expected)
    scored = rewarder.combine(parts, RED)
    assert scored.correct == 2.0
    assert scored.shaping == pytest.approx(-0.25 + 0.25 - 5 / 7 - 3.0)
    assert scored.total == pytest.approx(scored.correct + scored.shaping)
    assert rewarder.parts(said("blue", 5), RED) == dict.fromkeys(expected, 0.0)
    assert rewarder.parts(said("[0, 0, 10, 5]"), BOX)["iou"] == 0.5


def test_a_wrong_answer_that_was_cut_is_0_and_a_redundant_one_says_so() -> None:
    rewarder = RewardConfig(redundant=0.5).build(10)
    cut, looped = said("blue blue", 10, "cut"), said("blue blue", 10, "redundant")
    assert rewarder.combine(rewarder.parts(cut, RED), RED).total == 0
    assert rewarder.combine(rewarder.parts(looped, RED), RED).total == -0.5


def test_max_length_goes_before_the_longest_sample() -> None:
    config = RewardConfig(length=0.5, soft_length=4, max_length=8)
    assert config.build(10).parts(said("red", 6), RED)["length"] == -0.5


def test_length_and_repetition_are_of_all_turns_of_the_policy() -> None:
    turns = (
        Segment("policy", "crop", (1, 2, 3), (0.0,) * 3),
        Segment("environment", "here", (1, 2, 3, 1, 2, 3)),
        Segment("policy", "red", (3, 1, 2), (0.0,) * 3),
    )
    trajectory = Trajectory(turns, None, None)
    rewarder = RewardConfig(length=1.0, soft_length=4, repetition=1.0, repetition_ngram=2).build(8)
    # (1, 2) comes twice; (3, 3) would reach from one turn into the next.
    assert rewarder.parts(trajectory, RED) == pytest.approx({"correct": 1.0, "length": -0.5, "repetition": -1 / 4})


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 3), max_size=30), ngram=st.integers(1, 5))
def test_repetition_against_counting(ids: list[int], ngram: int) -> None:
    value = repetition_reward(said("", tuple(ids)), ngram)
    seen, again = set(), 0
    for start in range(len(ids) - ngram + 1):
        gram = str(ids[start : start + ngram])
        again += gram in seen
        seen.add(gram)
    assert value == pytest.approx(-again / max(len(ids) - ngram + 1, 1))
    assert -1 < value <= 0


@pytest.mark.parametrize(
    ("text", "total"), [(r"\boxed{red}", 1.1), ("red", 0.0), (r"\boxed{blue}", 0.1), (r"\boxed{red", 0.0)]
)
def test_accuracy_counts_only_where_the_format_is_right(text: str, total: float) -> None:
    config = RewardConfig(format=0.1, gates=(("correct", "format"),))
    rewarder = config.build(10)
    assert rewarder.combine(rewarder.parts(said(text), RED), RED).total == pytest.approx(total)


def test_a_gate_may_look_at_what_has_no_weight_and_shows_the_verdict_all_the_same() -> None:
    rewarder = RewardConfig(gates=(("correct", "format"),)).build(10)
    parts = rewarder.parts(said("red"), RED)
    assert parts == {"correct": 1.0, "format": 0.0}
    assert rewarder.combine(parts, RED).total == 0


def test_a_gate_opens_at_1_and_not_before() -> None:
    config = RewardConfig(iou=0.5, gates=(("iou", "correct"),))
    rewarder = config.build(10)
    for text, total in (("[0, 0, 10, 4]", 0.0), ("[0, 0, 10, 8]", 1.4)):
        assert rewarder.combine(rewarder.parts(said(text), BOX), BOX).total == pytest.approx(total)
    assert rewarder.combine({"correct": 0.99, "iou": 1.0}, BOX).shaping == 0


def test_format_pattern_is_for_all_of_the_reply() -> None:
    with RewardConfig(format=1.0, format_pattern=r"<think>.*</think>\w+").build(10) as rewarder:
        for text, value in (("<think>a\nb</think>red", 1), ("so <think></think>red", 0), ("<think></think>red!", 0)):
            assert rewarder.parts(said(text), RED)["format"] == value


def test_routes_weigh_a_part_by_task() -> None:
    config = RewardConfig(iou=0.0, routes=(("loc.*", "iou", 1.0), ("locate", "correct", 0.0), (".*", "iou", 7.0)))
    rewarder = config.build(10)
    parts = rewarder.parts(said("[0, 0, 10, 5]"), BOX)
    assert parts == {"correct": 1.0, "iou": 0.5}
    assert rewarder.combine(parts, BOX).total == 0.5  # the first route that fits, on another weight than the default
    relocated = replace(BOX, task="relocate")  # the whole name has to fit
    assert rewarder.combine(parts, relocated).total == 1.0 + 7 * 0.5


def test_rewards_of_ones_own() -> None:
    config = RewardConfig(custom=(own("brevity"),), custom_weights=(("brevity", 2.0), ("known", 0.0)))
    rewarder = config.build(10)
    parts = rewarder.parts(said("red", 4), RED)
    assert parts == {"brevity": 0.25, "known": 1.0, "correct": 1.0}
    assert rewarder.combine(parts, RED).shaping == 0.5
    judged = RewardConfig(custom=(own("vowels"),)).build(10)
    # It judges in the verifier's place, which has nothing to judge by here.
    assert judged.parts(said("aab"), Sample((), "c")) == {"correct": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0.5}, "soft_length must be positive"),
        ({"routes": (("a", "length", 1.0),)}, "soft_length must be positive"),
        ({"gates": (("correct", "fromat"),)}, "no part 'fromat'"),
        ({"routes": (("a", "speed", 1.0),)}, "no part 'speed'"),
        ({"routes": (("(", "iou", 1.0),)}, "not a regular expression"),
        ({"format_pattern": "["}, "not a regular expression"),
        ({"repetition_ngram": 0}, "at least 1"),
        ({"custom_weights": (("iou", 1.0),)}, "more than one weight"),
        ({"custom_weights": (("speed", 1.0),)}, "there is none"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**change)


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="more than the longest"):
        RewardConfig(length=0.5, soft_length=11).build(10)
    for name in ("mindjax.rl.rewards:nothing", "mindjax.nothing:f", "nothing"):
        with pytest.raises(ValueError, match=r"not a package\.module:function"):
            RewardConfig(custom=(name,)).build(10)
    with pytest.raises(ValueError, match="'known'"):
        twice = RewardConfig(custom=(own("brevity"), own("named_twice"))).build(10)
        twice.parts(said("red"), RED)
    with pytest.raises(ValueError, match="'length'"):
        RewardConfig(custom=(own("hides_length"),)).build(10).parts(said("red"), RED)
    rewarder = RewardConfig(custom=(own("brevity"),), custom_weights=(("brevity", 1.0), ("gone", 1.0))).build(10)
    with pytest.raises(ValueError, match="known has no weight"):
        rewarder.combine({"correct": 1.0, "brevity": 1.0, "gone": 1.0, "known": 0.0}, RED)
    with pytest.raises(ValueError, match="gone counts for task 'colour'"):
        rewarder.combine({"correct": 1.0, "brevity": 1.0}, RED)
    with pytest.raises(ValueError, match="no answer"):
        RewardConfig().build(10).parts(said("red"), Sample((), "c"))


def test_a_config_is_built_from_an_experiment_and_can_be_hashed() -> None:
    config = to_dataclass(
        RewardConfig,
        {
            "format": 1,
            "gates": [["correct", "format"]],
            "routes": [["locate", "iou", 1]],
            "custom": [own("brevity")],
            "custom_weights": [["brevity", 0.5], ["known", 0.0]],
        },
    )
    assert config.gates == (("correct", "format"),) and isinstance(hash(config), int)


def test_every_field_changes_something() -> None:
    """A field that nothing reads would be a promise that is not kept."""
    samples = [(said(r"\boxed{red}", (1, 1, 1, 1, 1, 2), "redundant"), RED), (said("[0, 0, 10, 8]", 10), BOX)]
    base: dict[str, Any] = {
        "correct": 1.0, "length": 0.5, "max_length": 0, "soft_length": 8, "format": 0.25, "format_pattern": "",
        "repetition": 1.0, "repetition_ngram": 2, "redundant": 1.0, "iou": 1.0, "custom": (), "custom_weights": (),
        "gates": (), "routes": (),
    }  # fmt: skip
    changed: dict[str, Any] = {
        "correct": 2.0, "length": 1.0, "max_length": 9, "soft_length": 5, "format": 1.0, "format_pattern": ".*",
        "repetition": 2.0, "repetition_ngram": 1, "redundant": 2.0, "iou": 2.0, "custom": (own("vowels"),),
        "custom_weights": (("known", 1.0),), "gates": (("iou", "format"),), "routes": (("colour", "format", 9.0),),
    }  # fmt: skip
    assert {*base, "timeout"} == set(RewardConfig.__dataclass_fields__)

    def totals(settings: dict[str, Any]) -> list[float]:
        with RewardConfig(**settings).build(12) as rewarder:
            return [rewarder.combine(rewarder.parts(t, s), s).total for t, s in samples]

    reference = totals(base)
    for name, value in changed.items():
        more = {"custom": (own("brevity"),)} if name == "custom_weights" else {}
        if name == "custom_weights":
            value = (*value, ("brevity", 0.0))
        assert totals({**base, name: value, **more}) != reference, name
    with RewardConfig(timeout=0.125).build(12) as rewarder:
        assert rewarder._verifier._worker.timeout == 0.125


def test_counters_count_what_came_since_they_were_read() -> None:
    rewarder = RewardConfig().build(10)
    assert set(rewarder.counters().values()) == {0.0}
    assert rewarder.parts(said("red" + " " * 10_000_000), RED)["correct"] == 0
    assert rewarder.counters()["verifier_too_long"] == 1
    assert set(rewarder.counters().values()) == {0.0}
