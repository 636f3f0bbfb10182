"""GSPO against a float64 loop over responses, finite differences, and properties; peers are in test_peers.py."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindjax.losses.gspo import gspo_loss

EPS = {"eps_low": 0.1, "eps_high": 0.2}
VALUE_AND_GRAD = {
    level: jax.jit(
        jax.value_and_grad(
            lambda logp, old, mask, adv, ids, weights, *, num_responses, level=level: (
                (out := gspo_loss(logp, old, mask, adv, level=level, response_ids=ids, weights=weights,
                                  num_responses=num_responses, **EPS)).sum, out,
            ),
            has_aux=True,
        ),
        static_argnames="num_responses",
    )
    for level in ("sequence", "token")
}  # fmt: skip


def run(logp: Any, old: Any, mask: Any, adv: Any, ids: Any = None, *, num: int | None = None, level: str = "sequence",
        weights: Any = None) -> tuple[Any, np.ndarray]:  # fmt: skip
    """(LossOutput, d sum / d logp)."""
    arrays = [None if a is None else jnp.asarray(a, jnp.float32) for a in (logp, old, mask, adv)]
    ids = None if ids is None else jnp.asarray(ids, jnp.int32)
    weights = None if weights is None else jnp.asarray(weights, jnp.float32)
    (_, out), grad = VALUE_AND_GRAD[level](*arrays, ids, weights, num_responses=num)
    return out, np.asarray(grad)


def brute_force(logp, old, mask, adv, ids, num, level, weights=None):  # type: ignore[no-untyped-def]
    """(sum, count, gradient, clipped low, clipped high) in float64, one response and one token at a time."""
    grad = np.zeros(logp.shape)
    total, count, low, high = 0.0, 0, 0, 0
    for i in range(num):
        places = [(b, t) for b, t in np.ndindex(*logp.shape) if ids[b, t] == i + 1 and mask[b, t]]
        if not places:
            continue
        count += 1
        length = len(places)
        s = np.exp(np.clip(sum(logp[p] - old[p] for p in places) / length, -20, 20))
        if level == "sequence":
            a = adv[i] if adv.ndim == 1 else np.mean([adv[p] for p in places])
            w = 1.0 if weights is None else weights[i]
            clipped = np.clip(s, 1 - EPS["eps_low"], 1 + EPS["eps_high"])
            total -= w * min(s * a, clipped * a)
            active = s * a <= clipped * a
            low, high = low + (not active and a < 0), high + (not active and a > 0)
            for p in places:
                grad[p] = -w * a * s / length if active else 0.0
        else:
            for p in places:
                a = adv[i] if adv.ndim == 1 else adv[p]
                w = 1.0 if weights is None else weights[i] if weights.ndim == 1 else weights[p]
                clipped = np.clip(s, 1 - EPS["eps_low"], 1 + EPS["eps_high"])
                total -= w * min(s * a, clipped * a) / length
                active = s * a <= clipped * a
                low, high = low + (not active and a < 0), high + (not active and a > 0)
                grad[p] = -w * a * s / length if active else 0.0
    return total, count, grad, low, high


def case(seed: int, rows: int = 5, length: int = 12, spread: float = 0.3):  # type: ignore[no-untyped-def]
    """Packed rows: two responses in each but the last, which has none; ids shuffled over the batch; 2 unused ids."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((rows, length), np.int32)
    names = iter(rng.permutation(2 * rows) + 1)
    for b in range(rows - 1):
        cut = rng.integers(3, length - 3)
        ids[b, 1:cut], ids[b, cut + 1 :] = next(names), next(names)
    mask = (rng.random((rows, length)) < 0.8) & (ids > 0)
    logp = -rng.random((rows, length)) * 3
    # A shared shift per response makes ratios differ from 1 by more than noise that averages out.
    shift = rng.normal(size=2 * rows + 1)[ids]
    old = logp + spread * shift + 0.05 * rng.normal(size=logp.shape)
    return logp, old, mask.astype(float), rng.normal(size=2 * rows), ids, 2 * rows


# Token weights at level="sequence" are refused, see test_bad_input.
@pytest.mark.parametrize(
    ("level", "weighted"),
    [("sequence", "none"), ("sequence", "response"), ("token", "none"), ("token", "response"), ("token", "token")],
)
@pytest.mark.parametrize("per_token", [False, True])
def test_equals_a_float64_loop(level: str, per_token: bool, weighted: str) -> None:
    rng = np.random.default_rng(3)
    seen = np.zeros(2, int)
    for seed in range(3):
        logp, old, mask, adv, ids, num = case(seed)
        adv = rng.normal(size=logp.shape) if per_token else adv
        weights = {"none": None, "response": rng.random(num), "token": rng.random(logp.shape)}[weighted]
        total, count, grad, low, high = brute_force(logp, old, mask, adv, ids, num, level, weights)
        out, actual = run(logp, old, mask, adv, ids, num=num, level=level, weights=weights)
        seen += (low, high)
        assert np.isclose(out.sum, total, rtol=1e-5, atol=1e-5) and out.count == count
        assert np.linalg.norm(actual - grad) <= 1e-6 * np.linalg.norm(grad) + 1e-7
        assert [float(out.metrics[name][0]) for name in ("clip_low", "clip_high")] == [low, high]
    assert seen.all(), "the cases must exercise both clips"


def test_gradient_equals_finite_differences_of_the_float64_loss() -> None:
    logp, old, mask, adv, ids, num = case(7, rows=3, length=9)
    _, grad = run(logp, old, mask, adv, ids, num=num)
    step = 1e-6
    for place in np.ndindex(*logp.shape):
        bumped = [logp.copy(), logp.copy()]
        bumped[0][place] += step
        bumped[1][place] -= step
        up, down = (brute_force(x, old, mask, adv, ids, num, "sequence")[0] for x in bumped)
        assert abs(grad[place] - (up - down) / (2 * step)) < 1e-6, place


def test_clipping_takes_the_gradient_away_and_nothing_else_does() -> None:
    """At eps of 1e-4 a ratio of 1.001 is outside: float32 must still see it, and bfloat16 inputs must not hide it."""
    eps = {"eps_low": 3e-4, "eps_high": 4e-4}
    old = jnp.full((4, 4), -1.0)
    logp = old + jnp.asarray([1e-3, -1e-3, 1e-3, -1e-3])[:, None]
    mask, adv = jnp.ones((4, 4)), jnp.asarray([1.0, -1.0, -1.0, 1.0])
    grad = jax.grad(lambda x: gspo_loss(x, old, mask, adv, **eps).sum)(logp)
    assert (grad[:2] == 0).all(), "right but already raised, wrong but already lowered: clipped"
    assert (grad[2:] != 0).all(), "wrong but raised, right but lowered: the pessimistic side stays"
    out = gspo_loss(logp, old, mask, adv, **eps)
    assert out.metrics["clip_high"] == (1, 4) and out.metrics["clip_low"] == (1, 4)
    assert np.isclose(out.maxima["ratio_max"], np.exp(1e-3), rtol=1e-6)
    assert np.isclose(out.maxima["ratio_inverse_max"], np.exp(1e-3), rtol=1e-6)


def test_on_policy_gradient_is_advantage_over_length() -> None:
    logp = -jnp.ones((2, 4))
    mask = jnp.asarray([[0, 1, 1, 0], [0, 1, 1, 1.0]])
    grad = jax.grad(lambda x: gspo_loss(x, logp, mask, jnp.asarray([2.0, -3.0]), eps_low=0.0, eps_high=0.0).mean)(logp)
    np.testing.assert_allclose(grad, -np.array([[0, 1, 1, 0], [0, -1, -1, -1]]) / 2, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), level=st.sampled_from(["sequence", "token"]))
def test_garbage_outside_of_the_mask_changes_nothing(seed: int, level: str) -> None:
    logp, old, mask, adv, ids, num = case(seed)
    clean, clean_grad = run(logp, old, mask, adv, ids, num=num, level=level)
    rng = np.random.default_rng(seed)
    garbage = rng.choice([np.nan, np.inf, -np.inf, 1e30, 0.0], size=(2, *logp.shape))
    dirty = [np.where(mask > 0, good, bad) for good, bad in zip((logp, old), garbage, strict=True)]
    absent = np.setdiff1d(np.arange(num), np.unique(ids[mask > 0]) - 1)
    adv = adv.copy()
    adv[absent] = np.nan
    out, grad = run(*dirty, mask, adv, ids, num=num, level=level)
    np.testing.assert_array_equal(grad, clean_grad)
    assert out.sum == clean.sum and out.count == clean.count
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), out.metrics, clean.metrics))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), level=st.sampled_from(["sequence", "token"]))
def test_row_order_and_response_names_do_not_matter(seed: int, level: str) -> None:
    logp, old, mask, adv, ids, num = case(seed)
    out, grad = run(logp, old, mask, adv, ids, num=num, level=level)
    rng = np.random.default_rng(seed)
    rows, names = rng.permutation(len(logp)), rng.permutation(num)
    renamed = np.concatenate([[0], names + 1])[ids]
    moved = np.empty_like(adv)
    moved[names] = adv
    other, other_grad = run(logp[rows], old[rows], mask[rows], moved, renamed[rows], num=num, level=level)
    assert np.isclose(out.sum, other.sum, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other_grad, grad[rows], rtol=1e-6, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), level=st.sampled_from(["sequence", "token"]), pieces=st.sampled_from([1, 2, 3, 6]))
def test_micro_batches_add_up(seed: int, level: str, pieces: int) -> None:
    logp, old, mask, adv, ids, num = case(seed, rows=6)
    whole, grad = run(logp, old, mask, adv, ids, num=num, level=level)
    parts = [
        run(*(a[rows] for a in (logp, old, mask)), adv, ids[rows], num=num, level=level)
        for rows in np.array_split(np.random.default_rng(seed).permutation(6), pieces)
    ]
    count = sum(float(out.count) for out, _ in parts)
    assert count == whole.count
    assert np.isclose(sum(float(out.sum) for out, _ in parts), whole.sum, rtol=1e-5, atol=1e-6)
    order = np.concatenate(np.array_split(np.random.default_rng(seed).permutation(6), pieces))
    joined = np.empty_like(grad)
    joined[order] = np.concatenate([g for _, g in parts])
    assert np.linalg.norm(joined / count - grad / count) <= 1e-6 * np.linalg.norm(grad / count) + 1e-9
    for name in ("clip_low", "clip_high", "ratio", "approx_kl"):
        total = [sum(float(out.metrics[name][i]) for out, _ in parts) for i in (0, 1)]
        np.testing.assert_allclose(total, [float(x) for x in whole.metrics[name]], rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), level=st.sampled_from(["sequence", "token"]))
def test_packed_equals_unpacked(seed: int, level: str) -> None:
    logp, old, mask, adv, ids, num = case(seed)
    packed, packed_grad = run(logp, old, mask, adv, ids, num=num, level=level)
    shape = (num, logp.shape[1])
    rows = [np.zeros(shape) for _ in range(3)]
    for b, t in np.ndindex(*logp.shape):
        if ids[b, t]:
            for target, source in zip(rows, (logp, old, mask), strict=True):
                target[ids[b, t] - 1, t] = source[b, t]
    alone, alone_grad = run(*rows, adv, level=level)
    assert np.isclose(packed.sum, alone.sum, rtol=1e-5, atol=1e-6) and packed.count == alone.count
    for b, t in np.ndindex(*logp.shape):
        if ids[b, t]:
            assert np.isclose(packed_grad[b, t], alone_grad[ids[b, t] - 1, t], rtol=1e-6, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_token_form_equals_sequence_form_for_constant_advantages(seed: int) -> None:
    logp, old, mask, adv, ids, num = case(seed)
    sequence, sequence_grad = run(logp, old, mask, adv, ids, num=num, level="sequence")
    for advantages in (adv, np.concatenate([[0.0], adv])[ids]):
        token, token_grad = run(logp, old, mask, advantages, ids, num=num, level="token")
        assert np.isclose(sequence.sum, token.sum, rtol=1e-5, atol=1e-6)
        assert np.linalg.norm(sequence_grad - token_grad) <= 1e-6 * np.linalg.norm(sequence_grad) + 1e-8


def test_token_weights_and_their_mean_have_equal_loss_but_other_gradients() -> None:
    rng = np.random.default_rng(0)
    logp, old = -np.ones((1, 5)), -np.ones((1, 5)) + 0.01
    weights = rng.random((1, 5))
    a, grad_a = run(logp, old, np.ones((1, 5)), [1.0], level="token", weights=weights)
    b, grad_b = run(logp, old, np.ones((1, 5)), [1.0], level="sequence", weights=[weights.mean()])
    assert np.isclose(a.sum, b.sum, rtol=1e-6) and np.abs(grad_a - grad_b).max() > 0.01


def test_runaway_ratios_and_empty_batches_stay_finite() -> None:
    mask = np.ones((2, 3))
    out, grad = run(np.full((2, 3), -1.0), np.full((2, 3), -900.0), mask, [1.0, -1.0])
    assert np.isfinite(out.sum) and np.isfinite(grad).all() and all(np.isfinite(m).all() for m in out.metrics.values())
    out, grad = run(np.full((2, 3), -1.0), np.full((2, 3), -1.0), 0 * mask, [1.0, -1.0])
    assert out.sum == 0 and out.count == 0 and out.mean == 0 and not grad.any()
    assert all(np.isfinite(m).all() for m in out.metrics.values())


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    logp = jnp.full((1, 4), -1.0, jnp.bfloat16)
    old = jnp.full((1, 4), -1.0078125, jnp.bfloat16)  # 2**-7 away: exp of it is not a bfloat16 number
    out = gspo_loss(logp, old, jnp.ones((1, 4)), jnp.ones((1,)), eps_low=1.0, eps_high=1.0)
    assert out.sum.dtype == jnp.float32 and np.isclose(-out.sum, np.exp(2**-7), rtol=1e-6)


def test_bad_input_is_refused_with_the_fix() -> None:
    x, a = jnp.zeros((2, 3)), jnp.zeros((2,))
    ids = jnp.ones((2, 3), jnp.int32)
    with pytest.raises(ValueError, match="logp_old has shape"):
        gspo_loss(x, x[:, :2], x, a, **EPS)
    with pytest.raises(ValueError, match="advantages has shape"):
        gspo_loss(x, x, x, jnp.zeros((3,)), **EPS)
    with pytest.raises(ValueError, match="'sequence' or 'token'"):
        gspo_loss(x, x, x, a, level="group", **EPS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="together"):
        gspo_loss(x, x, x, a, response_ids=ids, **EPS)
    with pytest.raises(ValueError, match="level='token'"):
        gspo_loss(x, x, x, a, weights=x, **EPS)
    with pytest.raises(ValueError, match="negative"):
        gspo_loss(x, x, x, a, eps_low=-0.1, eps_high=0.1)
    with pytest.raises(ValueError, match="batch axis"):
        gspo_loss(x[0], x[0], x[0], a, **EPS)


@lru_cache
def compiled(level: str, options: tuple[tuple[str, Any], ...]) -> Any:
    def loss(x: Any, old: Any, mask: Any, adv: Any, ids: Any, weights: Any, ref: Any) -> Any:
        out = gspo_loss(x, old, mask, adv, level=level, response_ids=ids, num_responses=len(adv), weights=weights,
                        logp_ref=ref if "kl" in dict(options) else None, **EPS, **dict(options))  # type: ignore[arg-type]  # fmt: skip
        return out.sum, out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def with_options(seed: int, options: dict[str, Any], level: str = "sequence", ref: Any = None) -> Any:
    """A packed case with its weights and reference: (its arrays, LossOutput, d sum / d logp)."""
    logp, old, mask, adv, ids, num = case(seed, spread=0.6)
    rng = np.random.default_rng(seed)
    weights = rng.random(num)
    ref = logp + 0.5 * rng.normal(size=logp.shape) if ref is None else ref
    floats = [jnp.asarray(a, jnp.float32) for a in (logp, old, mask, adv, weights, ref)]
    (_, out), grad = compiled(level, tuple(options.items()))(*floats[:4], jnp.asarray(ids), *floats[4:])
    return (logp, old, mask, adv, ids, num, weights, ref), out, np.asarray(grad)


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("dual_clip", [1.15, 1.5])
def test_dual_clip_bounds_what_a_wrong_answer_can_cost(level: str, dual_clip: float) -> None:
    """Both below and above 1 + eps_high: where A < 0 and s > c the term is c A, and its gradient 0."""
    (logp, old, mask, adv, ids, num, weights, _), out, grad = with_options(1, {"dual_clip": dual_clip}, level)
    total, expected, dual = 0.0, np.zeros(logp.shape), 0
    for i in range(num):
        places = (ids == i + 1) & (mask > 0)
        if not places.any():
            continue
        length = places.sum()
        s = np.exp((logp - old)[places].sum() / length)
        a = adv[i]
        unclipped = min(s * a, np.clip(s, 1 - EPS["eps_low"], 1 + EPS["eps_high"]) * a)
        value = max(unclipped, dual_clip * a) if a < 0 else unclipped
        total -= weights[i] * value
        if np.isclose(value, s * a):
            expected[places] = -weights[i] * a * s / length
        dual += (length if level == "token" else 1) * (a < 0 and s > dual_clip)
    assert np.isclose(out.sum, total, rtol=1e-5)
    assert np.linalg.norm(grad - expected) <= 1e-6 * np.linalg.norm(expected)
    assert out.metrics["clip_dual"][0] == dual > 0


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_kl_term_equals_float64_and_is_the_same_at_both_levels(kl: str, level: str) -> None:
    """Mean over a response's tokens, then over responses, times the coefficient; weights do not touch it."""
    estimate = {
        "k1": (lambda d: d, lambda d: np.ones_like(d)),
        "k2": (lambda d: d**2 / 2, lambda d: d),
        "k3": (lambda d: np.exp(-d) - 1 + d, lambda d: 1 - np.exp(-d)),
    }
    value, slope = estimate[kl]
    (logp, _, mask, _, ids, num, _, ref), out, grad = with_options(2, {"kl": kl, "kl_coefficient": 0.7}, level)
    _, without, plain = with_options(2, {}, level)
    lengths = np.array([((ids == i) & (mask > 0)).sum() for i in range(num + 1)])[ids]
    share = np.where(mask > 0, 1 / np.maximum(lengths, 1), 0.0)
    d = np.where(mask > 0, logp - ref, 0.0)
    total = (value(d) * share).sum()
    assert np.isclose(out.sum - without.sum, 0.7 * total, rtol=1e-4)
    assert np.linalg.norm(grad - plain - 0.7 * slope(d) * share) <= 2e-6 * np.linalg.norm(grad)
    assert np.isclose(out.metrics["reference_kl"][0], total, rtol=1e-4) and out.metrics["reference_kl"][1] == out.count


def test_a_kl_term_without_a_coefficient_is_only_reported() -> None:
    _, without, plain = with_options(2, {})
    _, reported, same = with_options(2, {"kl": "k2"})
    assert reported.sum == without.sum and reported.metrics["reference_kl"][0] > 0
    np.testing.assert_allclose(same, plain, rtol=1e-6)


def test_what_each_kl_term_does_as_a_loss() -> None:
    """Over a whole vocabulary: k2 has the gradient of KL(policy || ref), k3 of KL(ref || policy), k1 none."""
    rng = np.random.default_rng(0)
    theta, reference = (jnp.asarray(rng.normal(size=7), jnp.float32) for _ in range(2))

    def sampled(theta: Any, reference: Any, kl: str) -> Any:
        # One row per token of the vocabulary, as often as the policy says it, which is where samples come from.
        logp, ref, one = jax.nn.log_softmax(theta)[:, None], jax.nn.log_softmax(reference)[:, None], jnp.ones((7, 1))
        ids = jnp.arange(1, 8)[:, None]
        share = jax.lax.stop_gradient(jnp.exp(logp[:, 0]))

        def of_row(i: Any) -> Any:
            return gspo_loss(logp, logp, one, jnp.zeros(1), response_ids=(ids == i + 1) * 1, num_responses=1,
                             logp_ref=ref, kl=kl, kl_coefficient=1.0, **EPS).sum  # type: ignore[arg-type]  # fmt: skip

        return (share * jax.vmap(of_row)(jnp.arange(7))).sum()

    def kl(p: Any, q: Any) -> Any:
        return (jnp.exp(p) * (p - q)).sum()

    @jax.jit
    def gradients(theta: Any, reference: Any) -> Any:
        q = jax.nn.log_softmax(reference)
        reverse = jax.grad(lambda t: kl(jax.nn.log_softmax(t), q))(theta)
        forward = jax.grad(lambda t: kl(q, jax.nn.log_softmax(t)))(theta)
        return reverse, forward, [jax.grad(sampled)(theta, reference, kl) for kl in ("k1", "k2", "k3")]

    reverse, forward, (k1, k2, k3) = gradients(theta, reference)
    assert jnp.abs(reverse - forward).max() > 0.01
    for got, expected in ((k1, jnp.zeros(7)), (k2, reverse), (k3, forward)):
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_garbage_in_a_reference_changes_nothing(kl: str) -> None:
    options = {"kl": kl, "kl_coefficient": 0.7}
    (*_, ref), clean, clean_grad = with_options(2, options)
    mask = case(2, spread=0.6)[2]
    for bad in (np.nan, np.inf, -1e30):
        _, out, grad = with_options(2, options, ref=np.where(mask > 0, ref, bad))
        np.testing.assert_array_equal(grad, clean_grad)
        assert out.sum == clean.sum


def test_a_runaway_reference_stays_finite() -> None:
    _, out, grad = with_options(2, {"kl": "k3", "kl_coefficient": 0.7}, ref=np.full((5, 12), 500.0))
    assert np.isfinite(out.sum) and np.isfinite(grad).all()


def test_devices_add_up() -> None:
    """The rows of a batch over four devices: same sum, count and gradient, whatever is switched on."""
    program = Path(__file__).with_name("over_devices.py")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, program], env={**os.environ, **flags}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["sequence", "token"]


def test_bad_options_are_refused_with_the_fix() -> None:
    x, a = jnp.zeros((2, 3)), jnp.zeros((2,))

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            gspo_loss(x, x, x, a, **EPS, **options)

    refused("must be above 1", dual_clip=0.9)
    refused("must be above 1", dual_clip=float("nan"))
    refused("'k1', 'k2' or 'k3'", kl="k4", logp_ref=x)
    refused("drive the policy from", kl="k2", logp_ref=x, kl_coefficient=-1.0)
    refused("need an estimator", logp_ref=x)
    refused("need an estimator", kl_coefficient=0.1)
    refused("needs logp_ref of the shape", kl="k2")
    refused("needs logp_ref of the shape", kl="k2", logp_ref=x[:1])
