"""A draw against its definition, and the random numbers under it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mindjax.inference import draw
from mindjax.inference.sampler import sampling_keys

VOCABULARY, BANNED = 384, (380, 381, 382, 383)


def drawn(scores: Any, keys: Any, step: int, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Any:
    """(tokens, log-probabilities) of a draw for each key from the same scores [1, V]."""

    @jax.jit
    def run(scores: Any, keys: Any) -> Any:
        return draw.draw(
            jnp.repeat(scores, len(keys), axis=0), keys, jnp.int32(step), temperature=jnp.float32(temperature),
            top_k=jnp.int32(top_k), top_p=jnp.float32(top_p), banned=BANNED,
        )  # fmt: skip

    return map(np.asarray, run(jnp.asarray(scores), keys))


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.6), (5, 0.7), (0, 1e-6), (1, 1.0)])
def test_top_k_and_top_p_against_their_definition(top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(1)
    scores = (2 * rng.normal(size=(1, VOCABULARY))).astype(np.float32)
    draws = 4000
    tokens, logprobs = drawn(scores, sampling_keys(0, 0, range(draws), 1)[:, 0], 0, 1.3, top_k, top_p)

    scaled = scores[0].astype(np.float64) / 1.3
    scaled[list(BANNED)] = -np.inf
    kept: list[int] = []
    order = np.argsort(-scaled)[: top_k or None]
    p = np.exp(scaled[order]) / np.exp(scaled[order]).sum()
    for token, before in zip(order, np.cumsum(p) - p, strict=True):
        if before < top_p:
            kept.append(int(token))
    expected = np.exp(scaled[kept]) / np.exp(scaled[kept]).sum()
    assert set(tokens.tolist()) <= set(kept)
    for token, probability in zip(kept, expected, strict=True):
        share = (tokens == token).mean()
        assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / draws) + 1e-9
        np.testing.assert_allclose(logprobs[tokens == token], np.log(probability), rtol=0, atol=1e-5)


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    rng = np.random.default_rng(2)
    scores = (2 * rng.normal(size=(1, VOCABULARY))).astype(np.float32)
    draws = 20_000
    tokens, logprobs = drawn(scores, sampling_keys(3, 0, range(draws), 1)[:, 0], 9, 0.5)
    full = np.exp(scores[0].astype(np.float64) / 0.5)
    np.testing.assert_allclose(logprobs, np.log(full / full.sum())[tokens], rtol=0, atol=1e-5)
    full[list(BANNED)] = 0
    expected = full / full.sum()
    counts = np.bincount(tokens, minlength=len(expected))
    low, high = stats.binom.interval(1 - 1e-6, draws, expected)
    assert (counts >= low).all() and (counts <= high).all()


def test_random_numbers_are_exponential_and_independent() -> None:
    """Within a row, between rows of neighbouring keys, and between steps; each test at 1e-4, seeds fixed."""
    rows, size = 64, 4096
    keys = sampling_keys(0, 0, range(rows // 4), 4).reshape(-1)
    first, second = (np.asarray(jax.jit(draw.exponentials, static_argnums=2)(keys, step, size)) for step in (0, 1))
    assert first.min() > 0 and not (first == second).all(axis=1).any()
    uniform = np.exp(-first.astype(np.float64))
    assert stats.kstest(uniform.reshape(-1), "uniform").pvalue > 1e-4
    assert stats.kstest([stats.kstest(row, "uniform").pvalue for row in uniform], "uniform").pvalue > 1e-4
    # Small ones decide draws: a thousandth of them, as many in every row and at every place.
    small = first < 1e-3
    for counts in (small.sum(axis=0), small.sum(axis=1)):
        assert stats.chisquare(counts).pvalue > 1e-4
    others = (np.roll(uniform, 1, axis=0), np.exp(-second.astype(np.float64)), np.roll(uniform, 1, axis=1))
    for other in others:
        table = np.histogram2d(uniform.reshape(-1), other.reshape(-1), bins=16, range=[[0, 1], [0, 1]])[0]
        assert stats.chi2_contingency(table).pvalue > 1e-4
    # A bit of the counter changes each bit of the number in half of the cases.
    bits = np.asarray((1 - uniform) * 2**16, np.uint32)
    for shift in range(12):
        changed = bits ^ bits[:, np.arange(size) ^ (1 << shift)]
        shares = [((changed >> bit) & 1).mean() for bit in range(2, 16)]
        assert np.abs(np.asarray(shares) - 0.5).max() < 5 * 0.5 / np.sqrt(rows * size / 2)


def test_a_row_depends_on_its_key_and_step_alone() -> None:
    keys = sampling_keys(0, 0, range(3), 2).reshape(-1)
    together = np.asarray(draw.exponentials(keys, jnp.int32(5), 100))
    for row, key in enumerate(keys):
        np.testing.assert_array_equal(draw.exponentials(key[None], jnp.int32(5), 100)[0], together[row])


def test_first_of_largest_is_argmax() -> None:
    x = np.random.default_rng(0).integers(-3, 3, (50, 9)).astype(np.float32)
    x[3], x[4, 2] = -np.inf, np.inf
    np.testing.assert_array_equal(draw.first_of_largest(jnp.asarray(x)), np.argmax(x, axis=-1))
    x[5, 4] = np.nan
    assert draw.first_of_largest(jnp.asarray(x)).max() < 9  # a token, whatever came
