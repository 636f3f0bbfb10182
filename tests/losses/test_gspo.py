"""GSPO against a float64 loop over responses, finite differences, properties, and TRL where it is installed."""

from __future__ import annotations

from types import SimpleNamespace
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


def test_equals_trl() -> None:
    """TRL's sequence-level loss; rows without policy tokens are left out, it counts them in the mean."""
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer as trainer

    rng = np.random.default_rng(5)
    logp = -rng.random((6, 8)).astype(np.float32)
    old = logp + (0.3 * rng.normal(size=(6, 1)) + 0.05 * rng.normal(size=(6, 8))).astype(np.float32)
    mask = (np.arange(8)[None] < rng.integers(1, 9, size=(6, 1))).astype(np.float32)
    adv = rng.normal(size=6).astype(np.float32)
    leaf = torch.tensor(logp, requires_grad=True)
    identity = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False)
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (leaf, torch.zeros(6, 8), None),
        importance_sampling_level="sequence", loss_type="grpo", beta=0.0, aux_loss_enabled=False, use_vllm=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, epsilon_low=EPS["eps_low"],
        epsilon_high=EPS["eps_high"], args=args, model=SimpleNamespace(training=True), accelerator=identity,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics={"train": __import__("collections").defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(6, 8, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": torch.tensor(mask),
        "advantages": torch.tensor(adv), "old_per_token_logps": torch.tensor(old),
    }  # fmt: skip
    loss = trainer._compute_loss(stub, None, inputs)
    loss.backward()
    out, grad = run(logp, old, mask, adv)
    assert out.metrics["clip_low"][0] + out.metrics["clip_high"][0] > 0
    assert np.isclose(loss.item(), out.mean, rtol=1e-6)
    theirs = leaf.grad.numpy()
    assert np.linalg.norm(grad / 6 - theirs) <= 1e-6 * np.linalg.norm(theirs)
