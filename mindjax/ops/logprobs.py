"""Log-probabilities and entropies of given tokens, without ever holding the logits of a whole batch.

N places, H hidden size, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mindjax.ops.matmul import matmul

Array = jax.Array

# Logits of one chunk, in numbers: 2**24 float32 are 64 MiB, a few of which live at once in the backward pass.
CHUNK_LOGITS = 2**24


def token_logprobs(
    hidden: Array, head: Array, targets: Array, *, temperature: float | Array = 1.0, chunk: int | None = None
) -> tuple[Array, Array]:
    """Log-probability of each target, and entropy of the distribution it is drawn from.

    Args:
      hidden: [N, H], after the final norm.
      head: [H, V], of the dtype of `hidden`.
      targets: [N] int32 in 0..V-1.
      temperature: > 0; logits are divided by it before the softmax, so that both results are those of the
        distribution that sampling at this temperature draws from. No gradient reaches it.
      chunk: places whose logits exist at once, forward and backward; None chooses by V so that a chunk holds
        at most `CHUNK_LOGITS` numbers.

    Returns:
      (logp [N], entropy [N]), float32, in nats.

    Raises:
      ValueError: for a temperature that is not positive.
    """
    if not isinstance(temperature, jax.Array) and temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}; greedy decoding has no log-probabilities")
    temperature = jnp.asarray(temperature, jnp.float32)
    places, vocabulary = hidden.shape[0], head.shape[1]
    chunk = chunk or max(1, CHUNK_LOGITS // vocabulary)
    if places <= chunk:
        return _chunk_logprobs(hidden, head, targets, temperature)

    chunks = -(-places // chunk)
    padding = chunks * chunk - places
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, chunk, -1)
    targets = jnp.pad(targets, (0, padding)).reshape(chunks, chunk)
    one_chunk = jax.checkpoint(lambda pair: _chunk_logprobs(pair[0], head, pair[1], temperature))
    logp, entropy = lax.map(one_chunk, (hidden, targets))
    return logp.reshape(-1)[:places], entropy.reshape(-1)[:places]


@jax.custom_vjp
def _chunk_logprobs(hidden: Array, head: Array, targets: Array, temperature: Array) -> tuple[Array, Array]:
    return _forward(hidden, head, targets, temperature)[0]


# The backward pass is written out: it passes over the logits once, where the derived one does so a dozen times.
def _forward(hidden: Array, head: Array, targets: Array, temperature: Array) -> tuple[tuple[Array, Array], tuple]:
    # float32 from here on: eps of GSPO lies below the spacing of bfloat16 at 1.0.
    logits = matmul(hidden, head, dtype=jnp.float32) / temperature
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1)
    normaliser = largest[:, 0] + jnp.log(total)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    entropy = normaliser - jnp.sum(weights * logits, axis=-1) / total
    return (chosen - normaliser, entropy), (hidden, head, targets, temperature, logits, normaliser, entropy)


def _backward(saved: tuple, gradients: tuple[Array, Array]) -> tuple[Array, Array, np.ndarray, Array]:
    hidden, head, targets, temperature, logits, normaliser, entropy = saved
    d_logp, d_entropy = (g[:, None] for g in gradients)
    logp = logits - normaliser[:, None]
    chosen = targets[:, None] == jnp.arange(logits.shape[1], dtype=targets.dtype)[None]
    d_logits = jnp.where(chosen, d_logp, jnp.float32(0)) - jnp.exp(logp) * (
        d_logp + d_entropy * (logp + entropy[:, None])
    )
    _, product_vjp = jax.vjp(lambda hidden, head: matmul(hidden, head, dtype=jnp.float32), hidden, head)
    d_hidden, d_head = product_vjp(d_logits / temperature)
    return d_hidden, d_head, np.zeros(targets.shape, jax.dtypes.float0), jnp.zeros_like(temperature)


_chunk_logprobs.defvjp(_forward, _backward)
