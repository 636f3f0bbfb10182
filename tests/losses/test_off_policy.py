"""Correction weights and divergence against float64 NumPy, SciPy, whole distributions, and properties."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from mindjax.losses.gspo import gspo_loss
from mindjax.losses.off_policy import OffPolicyConfig, divergence, off_policy_weights, with_pearson

LEVELS, MODES = ("token", "sequence", "geometric"), ("truncate", "mask")
WEIGHTS = partial(jax.jit, static_argnames=("config", "num_responses"))(off_policy_weights)
DIVERGENCE = jax.jit(divergence)


def case(seed: int, spread: float = 0.4) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Five packed rows of two responses each but for the last, with holes in the mask: (old, rollout, mask, ids, n)."""
    rng = np.random.default_rng(seed)
    rows, length = 5, 12
    ids = np.zeros((rows, length), np.int32)
    names = iter(rng.permutation(2 * rows) + 1)
    for b in range(rows - 1):
        cut = rng.integers(3, length - 3)
        ids[b, 1:cut], ids[b, cut + 1 :] = next(names), next(names)
    mask = (rng.random((rows, length)) < 0.8) & (ids > 0)
    old = -3 * rng.random((rows, length))
    return old, old + spread * rng.normal(size=old.shape), mask.astype(float), ids, 2 * rows


def weigh(case: Any, level: str, mode: str = "truncate", packed: bool = True, **config: float) -> tuple[Any, Any]:
    old, rollout, mask, ids, number = case
    names = {"response_ids": jnp.asarray(ids), "num_responses": number} if packed else {}
    arrays = [jnp.asarray(x, jnp.float32) for x in (old, rollout, mask)]
    weights, metrics = WEIGHTS(*arrays, config=OffPolicyConfig(level, mode, **config), **names)  # type: ignore[arg-type]
    return np.asarray(weights), {name: (float(a), float(b)) for name, (a, b) in metrics.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
def test_equals_a_float64_loop(level: str, mode: str) -> None:
    cap, floor, cuts = 1.3, 0.8, 0
    for seed in range(3):
        old, rollout, mask, ids, number = case(seed)
        weights, metrics = weigh((old, rollout, mask, ids, number), level, mode, cap=cap, floor=floor)
        places = {i: [p for p in np.ndindex(*mask.shape) if mask[p] and ids[p] == i + 1] for i in range(number)}
        raw: dict[Any, float] = {}
        for i, tokens in places.items():
            differences = [old[p] - rollout[p] for p in tokens]
            if level == "token":
                raw |= {p: np.exp(d) for p, d in zip(tokens, differences, strict=True)}
            elif tokens:
                raw[i] = np.exp(sum(differences) / (len(tokens) if level == "geometric" else 1))
        cut = {p: w > cap or (mode == "mask" and w < floor) for p, w in raw.items()}
        expected = {p: (cap if mode == "truncate" else 0.0) if cut[p] else w for p, w in raw.items()}
        for p, w in expected.items():
            assert np.isclose(weights[p], w, rtol=1e-5), p
        cuts += sum(cut.values())
        assert metrics["off_policy_cut"] == (sum(cut.values()), len(raw))
        np.testing.assert_allclose(metrics["off_policy_weight"], (sum(expected.values()), len(raw)), rtol=1e-5)
    assert cuts, "the cases must cut something"


def test_no_level_is_no_weights() -> None:
    x = jnp.zeros((2, 3))
    assert off_policy_weights(x, x, x, OffPolicyConfig()) == (None, {})


@pytest.mark.parametrize("level", LEVELS)
def test_an_exact_rollout_weighs_one(level: str) -> None:
    old, _, mask, ids, number = case(0)
    weights, metrics = weigh((old, old, mask, ids, number), level, "mask", cap=1.0, floor=1.0)
    assert (weights == 1).all() and metrics["off_policy_cut"][0] == 0


def test_a_sequence_weight_makes_the_rollouts_mean_the_trainers() -> None:
    """All 3**4 answers of two models without memory: sum rollout(y) w(y) f(y) = sum trainer(y) f(y)."""
    rng = np.random.default_rng(0)
    trainer, rollout = rng.dirichlet(np.ones(3) * 3, size=4), rng.dirichlet(np.ones(3) * 3, size=4)
    answers = np.stack(np.meshgrid(*[np.arange(3)] * 4), -1).reshape(-1, 4)
    old, sampled = (np.log(p[np.arange(4), answers]) for p in (trainer, rollout))
    everything = np.ones_like(old)
    weights, _ = weigh((old, sampled, everything, None, None), "sequence", packed=False, cap=1e6)
    f = rng.normal(size=len(answers))
    assert np.isclose((np.exp(sampled.sum(1)) * weights * f).sum(), (np.exp(old.sum(1)) * f).sum(), atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), level=st.sampled_from(LEVELS), mode=st.sampled_from(MODES))
def test_garbage_outside_of_the_mask_changes_nothing(seed: int, level: str, mode: str) -> None:
    old, rollout, mask, ids, number = case(seed)
    rng = np.random.default_rng(seed)
    garbage = rng.choice([np.nan, np.inf, -np.inf, 1e30, 0.0], size=(2, *mask.shape))
    dirty = [np.where(mask > 0, good, bad) for good, bad in zip((old, rollout), garbage, strict=True)]
    clean, metrics = weigh((old, rollout, mask, ids, number), level, mode)
    weights, others = weigh((*dirty, mask, ids, number), level, mode)
    np.testing.assert_array_equal(weights, clean)
    assert metrics == others
    arrays = [jnp.asarray(x, jnp.float32) for x in (old, rollout, *dirty, mask)]
    jax.tree.map(np.testing.assert_array_equal, DIVERGENCE(*arrays[:2], arrays[4]), DIVERGENCE(*arrays[2:]))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), level=st.sampled_from(LEVELS))
def test_row_order_and_response_names_do_not_matter(seed: int, level: str) -> None:
    old, rollout, mask, ids, number = case(seed)
    weights, metrics = weigh((old, rollout, mask, ids, number), level)
    rng = np.random.default_rng(seed)
    rows, names = rng.permutation(len(old)), rng.permutation(number)
    renamed = np.concatenate([[0], names + 1])[ids].astype(np.int32)
    moved, others = weigh((old[rows], rollout[rows], mask[rows], renamed[rows], number), level)
    np.testing.assert_allclose(moved, weights[rows] if level == "token" else weights[np.argsort(names)], rtol=1e-6)
    np.testing.assert_allclose(metrics["off_policy_weight"], others["off_policy_weight"], rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), level=st.sampled_from(("sequence", "geometric")))
def test_packed_equals_unpacked(seed: int, level: str) -> None:
    old, rollout, mask, ids, number = case(seed)
    packed, metrics = weigh((old, rollout, mask, ids, number), level)
    rows = [np.stack([np.where(ids == i + 1, x, 0.0).sum(axis=0) for i in range(number)]) for x in (old, rollout, mask)]
    alone, others = weigh((*rows, None, None), level, packed=False)
    np.testing.assert_allclose(packed, alone, rtol=1e-6)
    np.testing.assert_allclose(metrics["off_policy_weight"], others["off_policy_weight"], rtol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_divergence_equals_numpy_and_scipy_and_adds_up_over_micro_batches(seed: int) -> None:
    old, rollout, mask, *_ = case(seed)
    values: dict[str, np.ndarray] = {}
    largest = []
    for b in range(len(old)):
        metrics, maxima = DIVERGENCE(*(jnp.asarray(x[b : b + 1], jnp.float32) for x in (old, rollout, mask)))
        for name, pair in metrics.items():
            values[name] = values.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
        largest.append(float(maxima["rollout_max"]))
    averaged = with_pearson({"loss": 3.0} | {name: a / b for name, (a, b) in values.items()})
    x, y = old[mask > 0], rollout[mask > 0]
    d = x - y
    assert averaged.keys() == {"loss", "rollout_kl", "rollout_difference", "rollout_pearson"}
    assert np.isclose(averaged["rollout_kl"], (np.exp(d) - 1 - d).mean(), rtol=1e-4)
    assert np.isclose(averaged["rollout_difference"], np.abs(d).mean(), rtol=1e-5)
    assert np.isclose(averaged["rollout_pearson"], pearsonr(x, y)[0], atol=1e-5)
    assert np.isclose(max(largest), np.abs(d).max(), rtol=1e-5)


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
def test_a_correlation_close_to_one_keeps_its_digits(noise: float) -> None:
    rng = np.random.default_rng(0)
    old = (-3 * rng.random((64, 64))).astype(np.float32)
    rollout = (old * 1.0001 + noise * rng.normal(size=old.shape)).astype(np.float32)
    metrics, _ = DIVERGENCE(jnp.asarray(old), jnp.asarray(rollout), jnp.ones_like(old))
    got = with_pearson({name: float(a) / float(b) for name, (a, b) in metrics.items()})["rollout_pearson"]
    away = 1 - pearsonr(old.ravel().astype(np.float64), rollout.ravel().astype(np.float64))[0]
    assert 0 < away < 1e-4 and np.isclose(1 - got, away, rtol=0.02)


def test_a_correlation_of_what_does_not_vary() -> None:
    def pearson(old: Any, rollout: Any) -> float:
        metrics, _ = DIVERGENCE(*(jnp.asarray([x], jnp.float32) for x in (old, rollout)), jnp.ones((1, 2)))
        return with_pearson({name: float(a) / float(b) for name, (a, b) in metrics.items()})["rollout_pearson"]

    assert pearson([-1, -1], [-1, -1]) == 1.0 and pearson([-1, -1], [-1, -3]) == 0.0
    assert pearson([-1, -2], [-2, -1]) == -1.0
    assert with_pearson({"loss": 1.0}) == {"loss": 1.0}


def test_the_kl_estimator_is_that_of_the_rollout_against_the_trainer() -> None:
    """Over a whole vocabulary its mean is KL(rollout || trainer), exactly, and no token is below 0."""
    rng = np.random.default_rng(1)
    rollout, trainer = rng.dirichlet(np.ones(20)), rng.dirichlet(np.ones(20))
    terms = []
    for q, p in zip(rollout, trainer, strict=True):
        metrics, _ = DIVERGENCE(*(jnp.asarray([[x]], jnp.float32) for x in (np.log(p), np.log(q), 1.0)))
        terms.append(float(metrics["rollout_kl"][0]))
    assert min(terms) >= 0
    assert np.isclose((rollout * terms).sum(), (rollout * np.log(rollout / trainer)).sum(), rtol=1e-4)


def test_extremes_stay_finite_and_what_is_missing_does_not_pass_as_agreement() -> None:
    one = np.ones((2, 3))
    for level in LEVELS:
        for distance in (900.0, -900.0):
            weights, _ = weigh((-1 * one, (-1 - distance) * one, one, None, None), level, packed=False)
            assert np.isfinite(weights).all()
    metrics, _ = DIVERGENCE(*(jnp.asarray(x, jnp.float32) for x in (-1 * one, -901 * one, one)))
    assert all(np.isfinite(a) for a, _ in metrics.values())
    weights, metrics = weigh((one, one, 0 * one, None, None), "sequence", packed=False)
    assert np.isfinite(weights).all() and metrics["off_policy_weight"] == (0, 0)
    missing = np.where(np.arange(3) == 1, np.nan, -one)
    for level in LEVELS:
        assert np.isnan(weigh((-one, missing, one, None, None), level, packed=False)[0]).any()


@pytest.mark.parametrize("level", LEVELS)
def test_neither_weights_nor_divergence_have_a_gradient(level: str) -> None:
    old, rollout, mask, *_ = (jnp.asarray(x, jnp.float32) for x in case(3))

    def everything(old: jax.Array, rollout: jax.Array) -> jax.Array:
        weights, metrics = off_policy_weights(old, rollout, mask, OffPolicyConfig(level))  # type: ignore[arg-type]
        return sum(x.sum() for x in jax.tree.leaves((weights, metrics, divergence(old, rollout, mask))))

    for gradient in jax.jit(jax.grad(everything, argnums=(0, 1)))(old, rollout):
        assert not gradient.any()


@pytest.mark.parametrize("level", LEVELS)
def test_the_weights_multiply_the_loss_and_have_no_gradient(level: str) -> None:
    old, rollout, mask, ids, number = case(3)
    arrays = [jnp.asarray(x, jnp.float32) for x in (old, rollout, mask)]
    names = {"response_ids": jnp.asarray(ids), "num_responses": number}
    config = OffPolicyConfig(level)  # type: ignore[arg-type]
    form = "token" if level == "token" else "sequence"

    def loss(logp: jax.Array, recomputed: bool) -> jax.Array:
        # On policy the trainer's old log-probabilities are its current ones: nothing may flow through the weights.
        weights, _ = off_policy_weights(logp if recomputed else arrays[0], *arrays[1:], config, **names)
        return gspo_loss(logp, arrays[0], arrays[2], jnp.ones(number), eps_low=0.2, eps_high=0.2, level=form,
                         weights=weights, **names).sum  # type: ignore[arg-type]  # fmt: skip

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    through, fixed = gradient(arrays[0], True), gradient(arrays[0], False)
    np.testing.assert_allclose(through, fixed, rtol=1e-6)
    weights, _ = off_policy_weights(*arrays, config, **names)
    assert weights is not None
    by_token = np.asarray(weights if level == "token" else np.concatenate([[0], weights])[ids])
    lengths = np.array([(mask * (ids == i)).sum() for i in range(number + 1)])[ids]
    np.testing.assert_allclose(fixed, -by_token * mask / np.maximum(lengths, 1), rtol=1e-5)


def test_bad_input_is_refused_with_the_fix() -> None:
    for bad in ({"level": "word"}, {"mode": "clip"}, {"cap": 0.5}, {"cap": float("inf")}, {"floor": -0.1},
                {"floor": 1.5}):  # fmt: skip
        with pytest.raises(ValueError, match=f"off_policy: {next(iter(bad))} must"):
            OffPolicyConfig(**bad)  # type: ignore[arg-type]
    x, config = jnp.zeros((2, 3)), OffPolicyConfig("sequence")
    with pytest.raises(ValueError, match="batch axis"):
        off_policy_weights(x[0], x[0], x[0], config)
    with pytest.raises(ValueError, match="logp_rollout has shape"):
        off_policy_weights(x, x[:, :2], x, config)
    with pytest.raises(ValueError, match="mask has shape"):
        divergence(x, x, x[0])
    with pytest.raises(ValueError, match="together"):
        off_policy_weights(x, x, x, config, num_responses=2)
    with pytest.raises(ValueError, match="response_ids has shape"):
        off_policy_weights(x, x, x, config, response_ids=jnp.zeros((2, 2), jnp.int32), num_responses=2)
