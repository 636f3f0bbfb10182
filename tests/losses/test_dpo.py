"""The DPO loss against float64 NumPy and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindjax.losses.dpo import dpo_loss


def reference(chosen, rejected, beta, ref_chosen=0.0, ref_rejected=0.0):
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return np.logaddexp(0.0, -margin), margin


def example(seed, pairs=7):
    rng = np.random.default_rng(seed)
    return [-rng.exponential(20.0, pairs).astype(np.float32) for _ in range(4)]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), beta=st.floats(0.01, 2.0), referenced=st.booleans())
def test_equals_numpy(seed, beta, referenced):
    chosen, rejected, *refs = example(seed)
    refs64 = [r.astype(np.float64) for r in refs] if referenced else []
    named = {"ref_chosen": jnp.array(refs[0]), "ref_rejected": jnp.array(refs[1])} if referenced else {}
    loss = dpo_loss(jnp.array(chosen), jnp.array(rejected), beta=beta, **named)
    values, margin = reference(chosen.astype(np.float64), rejected.astype(np.float64), beta, *refs64)
    np.testing.assert_allclose(float(loss.sum), values.sum(), rtol=1e-5, atol=1e-6)
    assert float(loss.count) == len(chosen)
    means = {name: float(total / count) for name, (total, count) in loss.metrics.items()}
    np.testing.assert_allclose(means["margin"], margin.mean(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(means["reward_chosen"] - means["reward_rejected"], margin.mean(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(means["accuracy"], (margin > 0).mean(), rtol=1e-6)


@pytest.mark.usefixtures("strict")
def test_gradient_equals_finite_differences():
    chosen, rejected, ref_chosen, ref_rejected = example(5)
    arrays = tuple(map(jnp.array, (chosen, rejected, ref_chosen, ref_rejected)))

    def loss(c, r, rc, rr):
        return dpo_loss(c, r, beta=0.3, ref_chosen=rc, ref_rejected=rr).sum

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)
    step, wide = 1e-4, [a.astype(np.float64) for a in (chosen, rejected, ref_chosen, ref_rejected)]
    for argument in (0, 1):
        up, down = [list(wide), list(wide)]
        up[argument], down[argument] = wide[argument] + step, wide[argument] - step
        value = [reference(a[0], a[1], 0.3, a[2], a[3])[0] for a in (up, down)]
        np.testing.assert_allclose(gradients[argument], (value[0] - value[1]) / (2 * step), rtol=1e-4, atol=1e-7)
    assert not np.any(gradients[2]) and not np.any(gradients[3]), "the reference is never differentiated"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_depends_on_the_difference_alone_and_falls_as_the_chosen_gains(seed, shift):
    chosen, rejected, *_ = map(jnp.array, example(seed))
    base = dpo_loss(chosen, rejected, beta=0.1).sum
    moved = dpo_loss(chosen + jnp.float32(shift), rejected + jnp.float32(shift), beta=0.1).sum
    np.testing.assert_allclose(base, moved, rtol=1e-4, atol=1e-4)
    assert float(dpo_loss(chosen + 1, rejected, beta=0.1).sum) < float(base)


def test_equal_answers_cost_log_two_and_a_reference_equal_to_the_policy_too():
    chosen, rejected, *_ = map(jnp.array, example(0))
    np.testing.assert_allclose(dpo_loss(chosen, chosen, beta=0.1).mean, np.log(2), rtol=1e-6)
    same = dpo_loss(chosen, rejected, beta=0.1, ref_chosen=chosen, ref_rejected=rejected)
    np.testing.assert_allclose(same.mean, np.log(2), rtol=1e-6)


def test_empty_places_have_no_influence():
    chosen, rejected, *_ = map(jnp.array, example(4))
    valid = jnp.array([1, 1, 0, 1, 0, 0, 1], jnp.float32)

    def loss(c, r):
        return dpo_loss(c, r, beta=0.2, valid=valid)

    bad = jnp.where(valid > 0, chosen, jnp.nan)
    assert float(loss(bad, rejected).sum) == float(loss(chosen, rejected).sum)
    assert float(loss(chosen, rejected).count) == 4
    gradient = jax.grad(lambda c: loss(c, rejected).sum)(bad)
    assert np.isfinite(gradient).all() and not np.any(gradient[valid == 0])


def test_far_margins_stay_finite():
    loss = dpo_loss(jnp.array([-1e6, 0.0]), jnp.array([0.0, -1e6]), beta=1.0)
    np.testing.assert_allclose(float(loss.sum), 1e6)


def test_mistakes_are_named():
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match="beta must be positive"):
        dpo_loss(x, x, beta=0.0)
    with pytest.raises(ValueError, match="or neither"):
        dpo_loss(x, x, beta=0.1, ref_chosen=x)
