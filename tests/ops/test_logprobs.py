"""Log-probabilities and entropies against float64, chunked and not, and their memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.ops.logprobs import token_logprobs

N, H, V = 11, 6, 17


def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(N, H)).astype(np.float32), rng.normal(size=(H, V)).astype(np.float32)
    return hidden, head, rng.integers(0, V, N).astype(np.int32)


def reference(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, temperature: float) -> tuple[np.ndarray, ...]:
    logits = hidden.astype(np.float64) @ head.astype(np.float64) / temperature
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return logp[np.arange(len(targets)), targets], -(np.exp(logp) * logp).sum(-1)


@pytest.mark.parametrize("chunk", [None, 4, 11, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_matches_float64(path: str, temperature: float, chunk: int | None) -> None:
    hidden, head, targets = operands()
    logp, entropy = token_logprobs(hidden, head, targets, temperature=temperature, chunk=chunk)
    tied = token_logprobs(hidden, head.T, targets, temperature=temperature, chunk=chunk, transposed=True)
    expected = reference(hidden, head, targets, temperature)
    assert logp.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(logp, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tied, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("chunk", [None, 4])
def test_gradients_against_finite_differences(path: str, chunk: int | None, transposed: bool) -> None:
    hidden, head, targets = operands()
    weights = np.random.default_rng(1).normal(size=(2, N))

    def objective(hidden: jax.Array, head: jax.Array) -> jax.Array:
        head = head.T if transposed else head
        logp, entropy = token_logprobs(hidden, head, targets, temperature=0.7, chunk=chunk, transposed=transposed)
        return (logp * weights[0].astype(np.float32)).sum() + (entropy * weights[1].astype(np.float32)).sum()

    gradients = jax.jit(jax.grad(objective, argnums=(0, 1)))(hidden, head)
    arrays, step = [hidden.astype(np.float64), head.astype(np.float64)], 1e-5
    for which, gradient in enumerate(gradients):
        estimate = np.zeros(gradient.shape)
        for index in np.ndindex(gradient.shape):
            values = []
            for sign in (1, -1):
                moved = [array.copy() for array in arrays]
                moved[which][index] += sign * step
                values.append(sum((a * w).sum() for a, w in zip(reference(*moved, targets, 0.7), weights, strict=True)))
            estimate[index] = (values[0] - values[1]) / (2 * step)
        assert np.linalg.norm(gradient - estimate) / np.linalg.norm(estimate) < 1e-5


def test_memory_is_one_chunk_at_a_real_vocabulary() -> None:
    places, hidden, vocabulary = 1024, 64, 151_936

    def objective(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        logp, entropy = token_logprobs(x, head, targets)
        return logp.sum() + entropy.sum()

    shapes = (
        jax.ShapeDtypeStruct((places, hidden), jnp.float32),
        jax.ShapeDtypeStruct((hidden, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((places,), jnp.int32),
    )
    compiled = jax.jit(jax.grad(objective, argnums=(0, 1))).lower(*shapes).compile()
    logits = places * vocabulary * 4
    head = hidden * vocabulary * 4
    # Four arrays of a chunk of 2^24 numbers, and the head's accumulating gradient; all logits alone are 593 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**26 + 4 * head < logits


def test_greedy_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        token_logprobs(*operands(), temperature=0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_places_that_are_not_asked_for_take_no_part(
    path: str, transposed: bool, chunk: int | None, dtype: jnp.dtype
) -> None:
    """Whatever they hold: the others are as they are by themselves."""
    hidden, head, targets = operands()
    asked = np.array([0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0], bool)
    weights = np.random.default_rng(1).normal(size=(2, N)).astype(np.float32)
    matrix = (head.T if transposed else head).astype(dtype)

    def objective(x: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
        logp, entropy = token_logprobs(x, matrix, targets, chunk=chunk, transposed=transposed)
        return (logp * weights[0]).sum() + (entropy * weights[1]).sum(), (logp, entropy)

    gradient = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
    hidden[~asked] = 1e4  # e to that is infinite
    (d_hidden, d_head), results = gradient(hidden.astype(dtype), matrix, np.where(asked, targets, -1), weights)
    alone = gradient(hidden[asked].astype(dtype), matrix, targets[asked], weights[:, asked])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == jnp.float32 else {"rtol": 2e-2, "atol": 1e-2}
    for result, expected in zip(results, alone[1], strict=True):
        np.testing.assert_allclose(result[asked], expected, rtol=1e-5, atol=1e-6)
        assert not np.any(result[~asked])
    assert not np.any(np.asarray(d_hidden[~asked], np.float32))
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (d_hidden[asked], alone[0][0])), **tolerance)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (d_head, alone[0][1])), **tolerance)


@pytest.mark.parametrize("chunk", [None, 4])
def test_nothing_asked_for(path: str, chunk: int | None) -> None:
    hidden, head, targets = operands()

    def objective(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return sum(x.sum() for x in token_logprobs(hidden, head, jnp.full_like(targets, -1), chunk=chunk))

    value, gradients = jax.value_and_grad(objective, argnums=(0, 1))(hidden, head)
    assert value == 0
    assert not any(np.any(gradient) for gradient in gradients)
