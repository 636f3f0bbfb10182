"""Advantages against brute force over all draws, numbers from the papers, SciPy, and properties."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from scipy.stats import hypergeom

from mindjax.rl import advantages

Estimator = Callable[..., np.ndarray]


def distances(rng: np.random.Generator, groups: int, answers: int, share: float = 0.4) -> np.ndarray:
    """Symmetric, 0 on the diagonal and at a share of the pairs."""
    d = rng.random((groups, answers, answers)) * (rng.random((groups, answers, answers)) > share)
    d = np.triu(d, 1)
    return d + d.swapaxes(1, 2)


def chain() -> np.ndarray:
    """Six answers, 0 ~ 1 ~ 2 and 3 ~ 5 the same, all else different."""
    d = 1.0 - np.eye(6)
    for i, j in ((0, 1), (1, 2), (3, 5)):
        d[i, j] = d[j, i] = 0.0
    return d[None]


def of_diversity(mode: str) -> Estimator:
    def estimate(rewards: np.ndarray, **flags: np.ndarray | None) -> np.ndarray:
        # The same matrix for the same answers in any order: from the rewards, which the cases make distinct.
        key = np.where(np.isfinite(rewards), rewards, 0.0)
        between = np.abs(key[:, :, None] - key[:, None, :])
        between = np.where(between < 0.3, 0.0, between / max(between.max(), 1.0))
        return advantages.diversity(rewards, between, mode=mode, **flags)  # type: ignore[arg-type]

    return estimate


ESTIMATORS: dict[str, Estimator] = {
    "group": lambda r, **f: advantages.group(r, normalize_deviation=False, **f),
    "group by deviation": lambda r, **f: advantages.group(r, normalize_deviation=True, **f),
    "centred": advantages.centred,
    "rloo": advantages.rloo,
    "batch": advantages.batch,
    "pass@1": lambda r, **f: advantages.pass_at_k((r > 0.5).astype(float), 1, **f),
    "pass@3": lambda r, **f: advantages.pass_at_k((r > 0.5).astype(float), 3, **f),
    "pairwise": of_diversity("pairwise"),
    "partition": of_diversity("partition"),
}
each = pytest.mark.parametrize("name", ESTIMATORS)


@pytest.mark.parametrize(
    ("answers", "right", "k", "positive", "negative"),
    [(8, 2, 4, 0.52223297, -0.17407766), (8, 3, 1, 1.29099445, -0.77459667)],
)
def test_pass_at_k_has_the_known_values(answers: int, right: int, k: int, positive: float, negative: float) -> None:
    rewards = np.zeros((1, answers))
    rewards[0, :right] = 1
    np.testing.assert_allclose(
        advantages.pass_at_k(rewards, k)[0], [positive] * right + [negative] * (answers - right), atol=5e-8
    )


def test_pass_at_k_is_the_mean_over_all_groups_of_k() -> None:
    """The definition: a group's reward is its best, normalised over all groups; an answer gets its groups' mean."""
    for answers in (2, 4, 6, 7):
        for k in range(1, answers + 1):
            rewards = np.array([[float(i < c) for i in range(answers)] for c in range(answers + 1)])
            got = advantages.pass_at_k(rewards, k)
            draws = list(itertools.combinations(range(answers), k))
            for row, result in zip(rewards, got, strict=True):
                best = np.array([max(row[list(draw)]) for draw in draws])
                score = (best - best.mean()) / best.std() if best.std() > 0 else np.zeros(len(draws))
                expected = [np.mean([s for s, draw in zip(score, draws, strict=True) if i in draw])
                            for i in range(answers)]  # fmt: skip
                np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize(("answers", "k"), [(8, 4), (16, 8), (64, 5)])
def test_pass_at_k_equals_the_formulas_with_the_hypergeometric_distribution(answers: int, k: int) -> None:
    for right in range(answers + 1):
        rewards = (np.arange(answers) < right).astype(float)[None]
        got = advantages.pass_at_k(rewards, k)[0]
        fails = hypergeom.pmf(0, answers, right, k)
        if right == 0 or answers - right < k:
            assert not got.any()
            continue
        sigma = math.sqrt(fails * (1 - fails))
        q = hypergeom.pmf(0, answers - 1, right, k - 1)
        np.testing.assert_allclose(got[0], fails / sigma, rtol=1e-6)
        np.testing.assert_allclose(got[-1], (fails - q) / sigma, rtol=1e-6)


def test_pass_at_k_is_informative_exactly_where_it_should_be() -> None:
    rewards = np.array([[float(i < c) for i in range(8)] for c in range(9)])
    informative = advantages.pass_at_k(rewards, 4).any(axis=1)
    np.testing.assert_array_equal(informative, [1 <= c <= 8 - 4 for c in range(9)])


def test_pass_at_1_is_the_group_advantage_with_its_deviation() -> None:
    rewards = (np.random.default_rng(0).random((20, 8)) < 0.4).astype(float)
    np.testing.assert_allclose(
        advantages.pass_at_k(rewards, 1), advantages.group(rewards, normalize_deviation=True), atol=1e-6
    )


def test_pass_at_k_of_many_answers_neither_overflows_nor_cancels() -> None:
    """C(20000, 10000) has 6019 digits. For two right ones, 1 - rho = (N-k)(N-k-1) / (N(N-1))."""
    answers, k = 20_000, 10_000
    rewards = np.zeros((1, answers))
    rewards[0, :2] = 1
    got = advantages.pass_at_k(rewards, k)[0]
    fails = (answers - k) * (answers - k - 1) / (answers * (answers - 1))
    np.testing.assert_allclose(got[0], math.sqrt(fails / (1 - fails)), rtol=1e-6)
    np.testing.assert_allclose(got[-1] * (answers - 2), -2 * got[0], rtol=1e-6)
    rewards[0, :9_000] = 1  # 1 - rho is below 1e-3000
    assert np.isfinite(advantages.pass_at_k(rewards, k)).all()


def test_diversity_factor_has_the_known_values() -> None:
    np.testing.assert_allclose(advantages.diversity_factor(chain(), "pairwise")[0], [0.8, 0.6, 0.8, 0.8, 1, 0.8])
    np.testing.assert_allclose(advantages.diversity_factor(chain())[0], [0.8, 0.6, 0.8, 0.8, 1, 0.8])
    np.testing.assert_allclose(advantages.diversity_factor(chain(), "partition")[0], [0.6, 0.6, 0.6, 0.8, 1, 0.8])


def test_partition_keeps_its_floor_and_pairwise_has_none() -> None:
    same = np.zeros((1, 4, 4))
    np.testing.assert_allclose(advantages.diversity_factor(same, "partition"), 0.1)
    np.testing.assert_allclose(advantages.diversity_factor(same, "pairwise"), 0.0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), answers=st.integers(2, 9), share=st.sampled_from([0.2, 0.6, 0.9]))
def test_diversity_factor_equals_a_loop_and_scipys_components(seed: int, answers: int, share: float) -> None:
    """With answers left out: each is compared with the ones in the statistics, itself added to them."""
    rng = np.random.default_rng(seed)
    d = distances(rng, 3, answers, share)
    outside = rng.random((3, answers)) < 0.3
    pairwise = advantages.diversity_factor(d, "pairwise", exclude_from_stats=outside)
    partition = advantages.diversity_factor(d, "partition", exclude_from_stats=outside)
    for g, i in np.ndindex(3, answers):
        members = [j for j in range(answers) if j == i or not outside[g, j]]
        others = [j for j in members if j != i]
        if not others:
            assert pairwise[g, i] == partition[g, i] == 1.0
            continue
        assert np.isclose(pairwise[g, i], np.mean([d[g, i, j] for j in others]))
        _, labels = connected_components(d[g][np.ix_(members, members)] == 0, directed=False)
        cluster = (labels == labels[members.index(i)]).sum()
        assert np.isclose(partition[g, i], max((len(members) - cluster) / (len(members) - 1), 0.1))


def test_a_long_chain_is_one_cluster() -> None:
    answers = 64
    d = 1.0 - np.eye(answers)
    for i in range(answers - 1):
        d[i, i + 1] = d[i + 1, i] = 0.0
    np.testing.assert_allclose(advantages.diversity_factor(d[None], "partition"), 0.1)


def test_diversity_is_centred_correctness_times_the_factor() -> None:
    rewards = np.array([[1.0, 1, 0, 0, 1, 0]])
    earned = rewards[0] * [0.8, 0.6, 0.8, 0.8, 1, 0.8]
    np.testing.assert_allclose(advantages.diversity(rewards, chain())[0], earned - earned.mean(), atol=1e-7)
    earned = rewards[0] * [0.6, 0.6, 0.6, 0.8, 1, 0.8]
    got = advantages.diversity(rewards, chain(), mode="partition")[0]
    np.testing.assert_allclose(got, earned - earned.mean(), atol=1e-7)


def test_wrong_answers_gain_nothing_by_being_different() -> None:
    rewards = np.array([[1.0, 1, 0, 0, 0, 0]])
    got = advantages.diversity(rewards, chain())[0]
    assert len(set(got[2:].tolist())) == 1 and got[0] > got[1] > got[2]


def test_group_rloo_and_batch_equal_their_formulas() -> None:
    rewards = np.random.default_rng(1).normal(size=(5, 6))
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(advantages.group(rewards, normalize_deviation=False), centred, atol=1e-6)
    np.testing.assert_allclose(
        advantages.group(rewards, normalize_deviation=True), centred / rewards.std(axis=1, keepdims=True), rtol=1e-5
    )
    np.testing.assert_allclose(advantages.batch(rewards), centred / rewards.std(), rtol=1e-5, atol=1e-7)
    others = [[row[i] - np.delete(row, i).mean() for i in range(6)] for row in rewards]
    np.testing.assert_allclose(advantages.rloo(rewards), others, rtol=1e-5, atol=1e-6)


def case(seed: int, groups: int = 4, answers: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).random((groups, answers))


@each
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_each_group_sums_to_zero_and_order_does_not_matter(name: str, seed: int) -> None:
    estimate, rewards = ESTIMATORS[name], case(seed)
    got = estimate(rewards)
    assert got.dtype == np.float32 and got.shape == rewards.shape
    np.testing.assert_allclose(got.sum(axis=1), 0, atol=2e-6)
    rng = np.random.default_rng(seed)
    order, groups = rng.permutation(rewards.shape[1]), rng.permutation(len(rewards))
    np.testing.assert_allclose(estimate(rewards[:, order]), got[:, order], atol=1e-6)
    np.testing.assert_allclose(estimate(rewards[groups]), got[groups], atol=1e-6)


@each
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_an_answer_left_out_of_both_is_as_if_it_had_not_been_sampled(name: str, seed: int) -> None:
    """Its reward has no influence, NaN included; the others get what a smaller group gives them."""
    estimate, rewards = ESTIMATORS[name], case(seed)
    rng = np.random.default_rng(seed)
    gone = int(rng.integers(rewards.shape[1]))
    flags = np.zeros(rewards.shape, bool)
    flags[:, gone] = True
    dirty = rewards.copy()
    dirty[:, gone] = np.nan
    got = estimate(dirty, exclude_from_stats=flags, exclude_from_loss=flags)
    assert not got[:, gone].any()
    kept = np.delete(np.arange(rewards.shape[1]), gone)
    np.testing.assert_allclose(got[:, kept], estimate(rewards[:, kept]), atol=1e-6)


@each
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_an_answer_left_out_of_one_alone(name: str, seed: int) -> None:
    """Of the loss: the others keep theirs. Of the statistics: the ones inside still sum to 0, and it has one too."""
    estimate, rewards = ESTIMATORS[name], case(seed)
    flags = np.random.default_rng(seed).random(rewards.shape) < 0.3
    whole = estimate(rewards)
    np.testing.assert_array_equal(estimate(rewards, exclude_from_loss=flags), np.where(flags, 0, whole))
    inside = estimate(rewards, exclude_from_stats=flags)
    np.testing.assert_allclose(np.where(flags, 0, inside).sum(axis=1), 0, atol=2e-6)


def test_what_an_answer_outside_of_the_statistics_gets() -> None:
    rewards, flags = np.array([[1.0, 0, 0, 1]]), np.array([[False, False, False, True]])
    out = {"exclude_from_stats": flags}
    mean, deviation = 1 / 3, math.sqrt(2) / 3
    expected = [1 - mean, -mean, -mean, 1 - mean]
    np.testing.assert_allclose(advantages.centred(rewards, **out)[0], expected, atol=1e-7)
    got = advantages.group(rewards, normalize_deviation=True, **out)[0]
    np.testing.assert_allclose(got, np.array(expected) / deviation, rtol=1e-6)
    np.testing.assert_allclose(advantages.rloo(rewards, **out)[0], [1, -0.5, -0.5, 1 - mean], atol=1e-7)
    np.testing.assert_allclose(advantages.batch(rewards, **out)[0], np.array(expected) / deviation, rtol=1e-6)
    got = advantages.pass_at_k(rewards, 2, **out)[0]
    np.testing.assert_allclose(got[3], got[0])
    np.testing.assert_allclose(got[:3], advantages.pass_at_k(rewards[:, :3], 2)[0])


@each
def test_nothing_to_compare_with_is_no_advantage(name: str) -> None:
    rewards = np.array([[1.0, 0.0, 0.6], [0.7, 0.7, 0.7]])
    flags = np.array([[False, True, True], [False, False, False]])
    assert not ESTIMATORS[name](rewards, exclude_from_stats=flags)[0].any(), "one answer in the statistics"
    assert not ESTIMATORS[name](rewards, exclude_from_stats=~flags)[1].any(), "none"
    assert not ESTIMATORS[name](np.full((2, 3), 0.1)).any(), "all equal, though 0.1 has no exact mean in binary"


@pytest.mark.parametrize("name", ["group by deviation", "batch", "pass@1"])
def test_where_the_statistics_do_not_vary_nobody_is_scaled_by_them(name: str) -> None:
    rewards = np.array([[0.1, 0.1, 0.1, 0.7]])
    got = ESTIMATORS[name](rewards, exclude_from_stats=rewards > 0.5)
    assert not got.any(), "NumPy's deviation of three times 0.1 is 1e-17, not 0"


def test_pass_at_k_gives_nothing_where_fewer_than_k_answers_are_left() -> None:
    rewards = np.array([[1.0, 0, 0, 0]])
    flags = np.array([[False, False, True, True]])
    assert not advantages.pass_at_k(rewards, 3, exclude_from_stats=flags).any()


@each
def test_bad_rewards_are_refused_with_the_fix(name: str) -> None:
    estimate = ESTIMATORS[name]
    with pytest.raises(ValueError, match="at least 2 samples per prompt"):
        estimate(np.ones((3, 1)))
    with pytest.raises(ValueError, match="booleans of shape"):
        estimate(case(0), exclude_from_stats=np.zeros((4, 7)))
    with pytest.raises(ValueError, match="booleans of shape"):
        estimate(case(0), exclude_from_loss=np.zeros((4, 6), bool))


@pytest.mark.parametrize("estimate", [advantages.centred, advantages.rloo, advantages.batch])
def test_rewards_of_one_group_need_their_axis(estimate: Estimator) -> None:
    with pytest.raises(ValueError, match=r"\[groups, answers\]"):
        estimate(np.ones(3))


@pytest.mark.parametrize("flag", ["exclude_from_stats", "exclude_from_loss", None])
def test_a_reward_that_is_not_finite_is_refused_where_it_counts(flag: str | None) -> None:
    rewards = case(0)
    rewards[1, 2] = np.nan
    flags = {} if flag is None else {flag: np.isnan(rewards)}
    for estimate in (advantages.centred, advantages.rloo, advantages.batch):
        with pytest.raises(ValueError, match=r"not finite at \[group, answer\] \[\[1, 2\]\]"):
            estimate(rewards, **flags)


def test_bad_input_of_pass_at_k_is_refused_with_the_fix() -> None:
    binary = np.array([[1.0, 0, 0]])
    for k in (4, 0, -1, 1.5):
        with pytest.raises(ValueError, match="lower k, or sample more"):
            advantages.pass_at_k(binary, k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[0, 1\] has 0.5: give it the correctness alone"):
        advantages.pass_at_k(np.array([[1.0, 0.5, 0]]), 2)


def test_bad_input_of_diversity_is_refused_with_the_fix() -> None:
    rewards, good = np.array([[1.0, 0, 1]]), 1.0 - np.eye(3)[None]

    def refused(match: str, rewards: np.ndarray = rewards, distance: np.ndarray = good, mode: str = "pairwise") -> None:
        with pytest.raises(ValueError, match=match):
            advantages.diversity(rewards, distance, mode=mode)  # type: ignore[arg-type]

    refused("cannot be negative", rewards=rewards - 1)
    refused(r"\[groups, answers, answers\]", distance=good[0])
    refused("one matrix per group", distance=np.repeat(good, 2, axis=0))
    refused("'pairwise' or 'partition'", mode="cosine")
    refused(r"lie in \[0, 1\]", distance=good * 2)
    refused(r"lie in \[0, 1\]", distance=np.where(good > 0, np.nan, good))
    refused("diagonal", distance=np.ones((1, 3, 3)))
    lopsided = good.copy()
    lopsided[0, 0, 1] = 0.5
    refused("symmetric", distance=lopsided)
    lopsided[0, 0, 1] = 1 - 1e-7  # a rounding error of float32
    np.testing.assert_allclose(advantages.diversity(rewards, lopsided), advantages.diversity(rewards, good), atol=1e-6)
