"""A token from its scores: temperature, top-k, top-p, and a draw that repeats for the same key.

R rows, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def draw(
    scores: Array, keys: Array, step: Array, *, temperature: Array, top_k: Array, top_p: Array, banned: tuple[int, ...]
) -> tuple[Array, Array]:
    """Draws a token per row.

    Args:
      scores: [R, V] float32.
      keys: [R] random keys.
      step: scalar, of the answer; other steps draw other numbers.
      temperature: scalar; 0 takes the best token.
      top_k, top_p: scalars; 0 and 1 leave all.
      banned: tokens that are never drawn, though log-probabilities count them.

    Returns:
      (tokens [R] int32, their log-probabilities [R] at this temperature, among what top_k and top_p leave).
    """
    greedy = temperature <= 0
    scores = scores / jnp.where(greedy, jnp.float32(1), temperature)
    normaliser = jax.nn.logsumexp(scores, axis=-1)
    vocabulary = jnp.arange(scores.shape[1], dtype=jnp.int32)
    unwanted = jnp.any(vocabulary[:, None] == jnp.asarray(banned, jnp.int32)[None], axis=1)
    scores = jnp.where(unwanted[None], -jnp.inf, scores)

    def truncated(scores: Array) -> tuple[Array, Array]:
        left = truncate(scores, top_k, top_p)
        return left, jax.nn.logsumexp(left, axis=-1)

    # Sorting the vocabulary costs more than the rest of this function; `cond` leaves it out unless asked for.
    limits = (top_k > 0) | (top_p < 1)
    scores, normaliser = jax.lax.cond(limits, truncated, lambda scores: (scores, normaliser), scores)

    def race(keys: Array) -> Array:
        # The token whose exponential of rate p ends first is a draw from p.
        return jnp.exp(scores - normaliser[:, None]) / exponentials(keys, step, scores.shape[1])

    tokens = first_of_largest(jax.lax.cond(greedy, lambda keys: scores, race, keys))
    chosen = jnp.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - normaliser


def exponentials(keys: Array, step: Array, size: int) -> Array:
    """[R, size] float32 from the exponential distribution of rate 1.

    JAX's own generator spends 20 rounds on each number, most of a draw's time on a CPU. Here it makes two words for a
    row, and a bijection of 32 bits makes the row's numbers of them: the mixer 16-21f0aaad-15-735a2d97-15 of C. Wellons'
    "hash prospector", twice.
    """
    words = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, step), (2,), jnp.uint32))(keys)
    counter = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    bits = _mix(_mix(counter[None] + words[:, :1]) ^ words[:, 1:])
    # Never 0; where it rounds to 1 the result is infinite, and the token is not drawn.
    uniform = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2**-32)
    return -jnp.log1p(-uniform)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)


def first_of_largest(x: Array) -> Array:
    """As `argmax` along the last axis, int32; XLA's argmax takes three times as long on a CPU."""
    places = jnp.arange(x.shape[-1], dtype=jnp.int32)
    largest = jnp.where(x == x.max(axis=-1, keepdims=True), places, x.shape[-1])
    return jnp.minimum(largest.min(axis=-1), x.shape[-1] - 1)  # NaN is equal to nothing


def truncate(scores: Array, top_k: Array, top_p: Array) -> Array:
    """-inf for all but the `top_k` best, and of these all but the first whose probabilities reach `top_p`.

    As in transformers: top_k comes first, and top_p is a share of what it leaves; the best token always stays. Equal
    scores at the edge stay together.
    """
    ranked = jnp.flip(jnp.sort(scores, axis=-1), axis=-1)
    size = scores.shape[-1]
    rank = jnp.arange(size, dtype=jnp.int32)
    ranked = jnp.where((rank < jnp.where(top_k > 0, top_k, size))[None], ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # A sum of probabilities may round to 1 before the last of them: without top_p all stay.
    kept = ((before < top_p) | (top_p >= 1)) & (ranked > -jnp.inf)
    edge = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores >= edge, scores, -jnp.inf)
