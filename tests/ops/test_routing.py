"""Routing by the kernels and by jnp, against NumPy and torch in float64."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mindjax.ops.routing import choose_experts, expert_shares, sort_by_expert

TOKENS = 1500  # more than one thread takes
SIZES = [(3, 1), (8, 2), (6, 6), (130, 8)]  # experts, choices
pytestmark = pytest.mark.usefixtures("path")
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def drawn(experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits, a third of them among few values, so that some are equal, and segments; padding holds anything."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(TOKENS, experts)).astype(np.float32) * 3
    logits[::3] = np.round(logits[::3]) + 0.0  # no -0, which counts as less than 0
    segments = rng.integers(0, 4, TOKENS).astype(np.int32)
    logits[np.flatnonzero(segments == 0)[::2]] = np.nan
    return logits, segments


@sizes
@pytest.mark.parametrize("normalise", [True, False])
def test_choices(size: tuple[int, int], normalise: bool) -> None:
    experts, choices = size
    logits, segments = drawn(experts)
    weights, chosen, probabilities = jax.jit(choose_experts, static_argnums=(2, 3))(
        logits, segments, choices, normalise
    )
    real = segments > 0
    wanted = torch.softmax(torch.from_numpy(logits[real]).double(), -1).numpy()
    likeliest = np.argsort(-logits[real], axis=-1, kind="stable")[:, :choices]
    np.testing.assert_array_equal(chosen[real], likeliest)
    np.testing.assert_allclose(probabilities[real], wanted, rtol=2e-6)
    of_choice = np.take_along_axis(wanted, likeliest, -1)
    np.testing.assert_allclose(
        weights[real], of_choice / (of_choice.sum(-1, keepdims=True) if normalise else 1), rtol=2e-6
    )
    assert (np.asarray(chosen)[~real] == experts).all()
    assert not np.any(np.asarray(weights)[~real]) and not np.any(np.asarray(probabilities)[~real])


@sizes
@pytest.mark.parametrize("normalise", [True, False])
def test_gradients_of_choices(size: tuple[int, int], normalise: bool) -> None:
    experts, choices = size
    logits, segments = drawn(experts)
    real, rng = segments > 0, np.random.default_rng(1)
    d_weights, d_probabilities = (rng.normal(size=(TOKENS, n)).astype(np.float32) for n in (choices, experts))

    def ours(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights, _, probabilities = choose_experts(logits, segments, choices, normalise)
        return weights, probabilities

    got = np.asarray(jax.vjp(ours, logits)[1]((d_weights, d_probabilities))[0])
    x = torch.from_numpy(logits[real]).double().requires_grad_()
    probabilities = torch.softmax(x, -1)
    likeliest = torch.from_numpy(np.argsort(-logits[real], axis=-1, kind="stable")[:, :choices].copy())
    weights = torch.gather(probabilities, 1, likeliest)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    (weights * torch.from_numpy(d_weights[real])).sum().backward(retain_graph=True)
    (probabilities * torch.from_numpy(d_probabilities[real])).sum().backward()
    assert x.grad is not None
    wanted = x.grad.numpy()
    assert np.linalg.norm(got[real] - wanted) < 1e-6 * np.linalg.norm(wanted)
    assert not np.any(got[~real])


@sizes
def test_sorting(size: tuple[int, int]) -> None:
    experts, choices = size
    rng = np.random.default_rng(0)
    chosen = rng.integers(-1, experts + 2, (TOKENS, choices)).astype(np.int32)  # of other devices, and of padding
    weights = rng.normal(size=chosen.shape).astype(np.float32)
    order, scales = jax.jit(sort_by_expert, static_argnums=2)(chosen, weights, experts)
    key = np.where((chosen >= 0) & (chosen < experts), chosen, experts).reshape(-1)
    wanted = np.argsort(key, kind="stable")
    np.testing.assert_array_equal(order.token, wanted // choices)
    np.testing.assert_array_equal(np.asarray(order.back).reshape(-1)[wanted], np.arange(wanted.size))
    np.testing.assert_array_equal(order.load, np.bincount(key, minlength=experts + 1)[:experts])
    np.testing.assert_array_equal(scales, weights.reshape(-1)[wanted])

    g = rng.normal(size=scales.shape).astype(np.float32)
    (d_weights,) = jax.vjp(lambda w: sort_by_expert(jnp.asarray(chosen), w, experts)[1], weights)[1](g)
    np.testing.assert_array_equal(d_weights.reshape(-1)[wanted], g)


@sizes
def test_shares(size: tuple[int, int]) -> None:
    experts, choices = size
    rng = np.random.default_rng(0)
    rows, length = 7, 50
    # Runs of each length down to 1; one id comes back after others, and after padding.
    segments = np.sort(rng.integers(0, 5, (rows, length)), axis=1).astype(np.int32)
    segments[1] = rng.integers(0, 3, length)
    segments[2], segments[3], segments[4, 20:30] = 0, 7, 0
    scores = rng.normal(size=(rows, length, experts))
    chosen = np.argsort(scores, axis=-1)[..., :choices].astype(np.int32)
    chosen[segments == 0] = experts
    shares = jax.jit(expert_shares, static_argnums=2)(chosen, segments, experts)
    wanted = np.zeros(scores.shape)
    for row in range(rows):
        edges = [0, *(np.flatnonzero(np.diff(segments[row])) + 1), length]
        for first, last in pairwise(edges):
            if segments[row, first]:
                counts = np.bincount(chosen[row, first:last].reshape(-1), minlength=experts)
                wanted[row, first:last] = counts / (last - first) ** 2
    np.testing.assert_allclose(shares, wanted, rtol=1e-6)
