"""The SFT loss against float64 NumPy, loop by loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindjax.losses.sft import sft_loss


def reference(logp, mask, segments, average):
    total, count = 0.0, 0.0
    for row in range(logp.shape[0]):
        for segment in sorted(set(segments[row].tolist())):
            values = [
                -float(x) for x, m, s in zip(logp[row], mask[row], segments[row], strict=True) if m and s == segment
            ]
            if values:
                total += sum(values) if average == "token" else sum(values) / len(values)
                count += len(values) if average == "token" else 1
    return total, count


def example(seed, rows=3, length=17):
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 5, (rows, length)), axis=1)
    segments = np.where(segments == 4, 0, segments).astype(np.int32)
    mask = ((rng.random((rows, length)) < 0.6) & (segments > 0)).astype(np.float32)
    return -rng.exponential(2.0, (rows, length)).astype(np.float32), mask, segments


@pytest.mark.parametrize("average", ["token", "sample"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_equals_numpy(average, seed):
    logp, mask, segments = example(seed)
    loss = sft_loss(jnp.array(logp), jnp.array(mask), segment_ids=jnp.array(segments), average=average)
    total, count = reference(logp.astype(np.float64), mask, segments, average)
    np.testing.assert_allclose(float(loss.sum), total, rtol=1e-6, atol=1e-6)
    assert float(loss.count) == count


@pytest.mark.parametrize("average", ["token", "sample"])
@pytest.mark.usefixtures("strict")
def test_gradient_is_minus_the_weight_of_each_target(average):
    logp, mask, segments = example(1)
    gradient = jax.grad(lambda x: sft_loss(x, jnp.array(mask), segment_ids=jnp.array(segments), average=average).sum)(
        jnp.array(logp)
    )
    step = 1e-3
    for row, t in [(0, 5), (1, 9), (2, 16), (0, 0)]:
        up, down = logp.astype(np.float64), logp.astype(np.float64)
        up[row, t] += step
        down[row, t] -= step
        slope = (reference(up, mask, segments, average)[0] - reference(down, mask, segments, average)[0]) / (2 * step)
        np.testing.assert_allclose(gradient[row, t], slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("average", ["token", "sample"])
def test_garbage_outside_targets_has_no_influence(average):
    logp, mask, segments = map(jnp.array, example(2))

    def loss(x):
        return sft_loss(x, mask, segment_ids=segments, average=average).sum

    bad = jnp.where(mask > 0, logp, jnp.nan)
    assert float(loss(bad)) == float(loss(logp))
    np.testing.assert_array_equal(jax.grad(loss)(bad), jax.grad(loss)(logp))


def test_rows_add_up_and_an_empty_batch_counts_nothing():
    logp, mask, segments = map(jnp.array, example(3))
    whole = sft_loss(logp, mask, segment_ids=segments, average="sample")
    parts = [
        sft_loss(logp[i : i + 1], mask[i : i + 1], segment_ids=segments[i : i + 1], average="sample") for i in range(3)
    ]
    np.testing.assert_allclose(float(whole.sum), sum(float(p.sum) for p in parts), rtol=1e-6)
    assert float(whole.count) == sum(float(p.count) for p in parts)
    nothing = sft_loss(logp, jnp.zeros_like(mask))
    assert float(nothing.sum) == 0 == float(nothing.count) == float(nothing.mean)


def test_mistakes_are_named():
    logp, mask, _ = map(jnp.array, example(0))
    with pytest.raises(ValueError, match="needs segment_ids"):
        sft_loss(logp, mask, average="sample")
    with pytest.raises(ValueError, match="'token' or 'sample'"):
        sft_loss(logp, mask, average="tokens")  # type: ignore[arg-type]
