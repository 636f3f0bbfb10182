"""Log-probabilities and entropies of given tokens, without ever holding the logits of a whole batch.

N places, H hidden size, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mindjax.ops.matmul import matmul, matmul_transposed

Array = jax.Array

# Logits of one chunk, in numbers: 2**24 float32 are 64 MiB, a few of which live at once in the backward pass.
CHUNK_LOGITS = 2**24
# Places of a chunk at least, on accelerators: the head is read once for each chunk, and fewer do not pay for that.
LEAST_PLACES = 1024


def token_logprobs(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    temperature: float | Array = 1.0,
    chunk: int | None = None,
    axis: str | None = None,
    transposed: bool = False,
) -> tuple[Array, Array]:
    """Log-probability of each target, and entropy of the distribution it is drawn from.

    Args:
      hidden: [N, H], after the final norm.
      head: [H, V], of the dtype of `hidden`.
      targets: [N] int32 in 0..V-1.
      temperature: > 0; logits are divided by it before the softmax, so that both results are those of the
        distribution that sampling at this temperature draws from. No gradient reaches it.
      chunk: places whose logits exist at once, forward and backward; None chooses by V so that a chunk holds
        at most `CHUNK_LOGITS` numbers, or `LEAST_PLACES` places where there is no CPU.
      axis: of a mesh, over which the vocabulary is split, in order: V is then a device's share, and targets count
        through all shares. The results are the same on every device. To be called inside `jax.shard_map`.
      transposed: whether `head` is [V, H], an embedding table that is the head too.

    Returns:
      (logp [N], entropy [N]), float32, in nats.

    Raises:
      ValueError: for a temperature that is not positive.
    """
    if not isinstance(temperature, jax.Array) and temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}; greedy decoding has no log-probabilities")
    temperature = jnp.asarray(temperature, jnp.float32)
    places, vocabulary = hidden.shape[0], head.shape[0 if transposed else 1]
    chunk = chunk or max(1 if jax.default_backend() == "cpu" else LEAST_PLACES, CHUNK_LOGITS // vocabulary)
    if places <= chunk:
        return _chunk_logprobs(hidden, head, targets, temperature, axis, transposed)

    chunks = -(-places // chunk)
    padding = chunks * chunk - places
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, chunk, -1)
    targets = jnp.pad(targets, (0, padding)).reshape(chunks, chunk)
    one_chunk = jax.checkpoint(lambda pair: _chunk_logprobs(pair[0], head, pair[1], temperature, axis, transposed))
    logp, entropy = lax.map(one_chunk, (hidden, targets))
    return logp.reshape(-1)[:places], entropy.reshape(-1)[:places]


def _product(hidden: Array, head: Array, transposed: bool) -> Array:
    # float32 from here on: eps of GSPO lies below the spacing of bfloat16 at 1.0.
    return (matmul_transposed if transposed else matmul)(hidden, head, dtype=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunk_logprobs(
    hidden: Array, head: Array, targets: Array, temperature: Array, axis: str | None, transposed: bool
) -> tuple[Array, Array]:
    return _forward(hidden, head, targets, temperature, axis, transposed)[0]


# The backward pass is written out: it passes over the logits once, where the derived one does so a dozen times.
def _forward(
    hidden: Array, head: Array, targets: Array, temperature: Array, axis: str | None, transposed: bool
) -> tuple[tuple[Array, Array], tuple]:
    logits = _product(hidden, head, transposed) / temperature
    largest = jnp.max(logits, axis=-1, keepdims=True)
    if axis is not None:
        largest = lax.pmax(largest, axis)
    weights = jnp.exp(logits - largest)
    share = logits.shape[1]
    place = targets - (0 if axis is None else lax.axis_index(axis) * share)
    chosen = jnp.take_along_axis(logits, jnp.clip(place, 0, share - 1)[:, None], axis=-1)[:, 0]
    sums = jnp.sum(weights, axis=-1), jnp.sum(weights * logits, axis=-1)
    if axis is not None:
        mine = (place >= 0) & (place < share)
        *sums, chosen = lax.psum((*sums, jnp.where(mine, chosen, jnp.float32(0))), axis)
    total, weighted = sums
    normaliser = largest[:, 0] + jnp.log(total)
    entropy = normaliser - weighted / total
    return (chosen - normaliser, entropy), (hidden, head, place, temperature, logits, normaliser, entropy)


def _backward(
    axis: str | None, transposed: bool, saved: tuple, gradients: tuple[Array, Array]
) -> tuple[Array, Array, np.ndarray, Array]:
    hidden, head, place, temperature, logits, normaliser, entropy = saved
    # Every device has the same results, each with its share of their gradient.
    d_logp, d_entropy = (g[:, None] for g in (gradients if axis is None else lax.psum(gradients, axis)))
    logp = logits - normaliser[:, None]
    chosen = place[:, None] == jnp.arange(logits.shape[1], dtype=place.dtype)[None]
    d_logits = jnp.where(chosen, d_logp, jnp.float32(0)) - jnp.exp(logp) * (
        d_logp + d_entropy * (logp + entropy[:, None])
    )
    _, product_vjp = jax.vjp(lambda hidden, head: _product(hidden, head, transposed), hidden, head)
    d_hidden, d_head = product_vjp(d_logits / temperature)
    return d_hidden, d_head, np.zeros(place.shape, jax.dtypes.float0), jnp.zeros_like(temperature)


_chunk_logprobs.defvjp(_forward, _backward)
