"""Log-probabilities and entropies of given tokens, without ever holding the logits of a whole batch.

N places, H hidden size, V vocabulary. Where nothing is asked for, as in prompts and padding, nothing is computed: the
places that are asked for come first, and products and loops end with them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_cuda import jax_binding, jax_fused
from mindjax.ops.bits import from_bits, to_bits
from mindjax.ops.dispatch import on_cpu
from mindjax.ops.matmul import contract, contract_rows

Array = jax.Array
Operands = tuple[Array, Array, Array, Array, Array]  # hidden, head, targets, temperature, how many places are asked for
Pair = tuple[Array, Array]  # of log-probability and entropy

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
      targets: [N] int32 in 0..V-1; below 0 where nothing is asked for: both results are 0 there, without gradient.
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
    targets = jnp.asarray(targets)
    asked = targets >= 0
    count = jnp.sum(asked, dtype=jnp.int32)
    rank = jnp.where(asked, jnp.cumsum(asked), count + jnp.cumsum(~asked)).astype(jnp.int32) - 1
    order = jnp.zeros_like(rank).at[rank].set(jnp.arange(places, dtype=jnp.int32), unique_indices=True)
    operands = _arrange(hidden, order, rank), head, targets[order], temperature, count
    results = _logprobs(operands, min(chunk, places), axis, transposed)
    logp, entropy = (jnp.where(asked, result[rank], jnp.float32(0)) for result in results)
    return logp, entropy


@jax.custom_vjp
def _arrange(x: Array, order: Array, rank: Array) -> Array:
    """x[order] for a permutation and its inverse, by which the gradient is a choice of rows too."""
    return on_cpu(jax_binding.permute, lambda x, order: from_bits(to_bits(x)[order], x.dtype), x, order)


_arrange.defvjp(
    lambda x, order, rank: (_arrange(x, order, rank), (order, rank)),
    lambda saved, g: (_arrange(g, *saved[::-1]), *(np.zeros(index.shape, jax.dtypes.float0) for index in saved)),
)


# The backward pass is written out: it passes over the logits once, where the derived one does so a dozen times, and its
# loop ends where nothing more is asked for.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _logprobs(operands: Operands, chunk: int, axis: str | None, transposed: bool) -> Pair:
    """Of the first `count` places; of the others anything."""
    return _forward(operands, chunk, axis, transposed)[0]


def _forward(
    operands: Operands, chunk: int, axis: str | None, transposed: bool
) -> tuple[Pair, tuple[Operands, tuple[Array, ...] | None]]:
    places, count = operands[0].shape[0], operands[-1]
    if places == chunk:
        results, saved = _chunk_forward(operands, axis, transposed)
        return results, (operands, saved)

    padded = _padded(operands, chunk)

    def one_chunk(i: Array, results: tuple[Array, ...]) -> tuple[Array, ...]:
        new, _ = _chunk_forward(_chunk(padded, i, chunk), axis, transposed)
        return tuple(lax.dynamic_update_index_in_dim(all, part, i, 0) for all, part in zip(results, new, strict=True))

    nothing = jnp.zeros((-(-places // chunk), chunk), jnp.float32)
    logp, entropy = lax.fori_loop(0, -(-count // chunk), one_chunk, (nothing, nothing))
    return (logp.reshape(-1)[:places], entropy.reshape(-1)[:places]), (operands, None)


def _backward(
    chunk: int,
    axis: str | None,
    transposed: bool,
    operands_and_saved: tuple[Operands, tuple[Array, ...] | None],
    gradients: Pair,
) -> tuple[tuple[Any, ...]]:
    operands, saved = operands_and_saved
    hidden, head, targets, temperature, count = operands
    if saved is not None:
        d_hidden, d_head = _chunk_backward(operands, saved, gradients, axis, transposed)
    else:
        padded, d_results = _padded(operands, chunk), [_pad(gradient, chunk) for gradient in gradients]

        def one_chunk(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            part = _chunk(padded, i, chunk)
            _, saved = _chunk_forward(part, axis, transposed)
            d_logp, d_entropy = (_slice(d_result, i, chunk) for d_result in d_results)
            d_part, d_head = _chunk_backward(part, saved, (d_logp, d_entropy), axis, transposed)
            return lax.dynamic_update_index_in_dim(sums[0], to_bits(d_part), i, 0), sums[1] + d_head

        chunks = -(-hidden.shape[0] // chunk)
        nothing = to_bits(jnp.zeros((chunks, chunk, hidden.shape[1]), hidden.dtype)), jnp.zeros_like(head)
        bits, d_head = lax.fori_loop(0, -(-count // chunk), one_chunk, nothing)
        d_hidden = from_bits(bits.reshape(-1, hidden.shape[1])[: hidden.shape[0]], hidden.dtype)
    d_targets, d_count = (np.zeros(x.shape, jax.dtypes.float0) for x in (targets, count))
    return ((d_hidden, d_head, d_targets, jnp.zeros_like(temperature), d_count),)


_logprobs.defvjp(_forward, _backward)


def _padded(operands: Operands, chunk: int) -> Operands:
    """The operands in whole chunks, rows as integers."""
    hidden, head, targets, temperature, count = operands
    return _pad(to_bits(hidden), chunk), head, _pad(targets, chunk), temperature, count


def _pad(x: Array, chunk: int) -> Array:
    return jnp.pad(x, [(0, -len(x) % chunk)] + [(0, 0)] * (x.ndim - 1))


def _chunk(padded: Operands, i: Array, chunk: int) -> Operands:
    """The operands of chunk `i`."""
    bits, head, targets, temperature, count = padded
    rows = from_bits(_slice(bits, i, chunk), head.dtype)
    return rows, head, _slice(targets, i, chunk), temperature, jnp.clip(count - i * chunk, 0, chunk)


def _slice(x: Array, i: Array, chunk: int) -> Array:
    return lax.dynamic_slice_in_dim(x, i * chunk, chunk)


def _chunk_forward(operands: Operands, axis: str | None, transposed: bool) -> tuple[Pair, tuple[Array, ...]]:
    hidden, head, targets, temperature, count = operands
    logits = _product(hidden, head, count, transposed)
    logp, entropy, normaliser = on_cpu(
        jax_fused.logprobs, partial(_of_logits, axis=axis), logits, targets, temperature, count
    )
    return (logp, entropy), (logits, normaliser, entropy)


def _of_logits(
    logits: Array, targets: Array, temperature: Array, _: Array, axis: str | None
) -> tuple[Array, Array, Array]:
    """(log-probability, entropy, logarithm of the sum of exponentials)"""
    logits = logits / temperature
    largest = jnp.max(logits, axis=-1, keepdims=True)
    if axis is not None:
        largest = lax.pmax(largest, axis)
    weights = jnp.exp(logits - largest)
    share = logits.shape[1]
    place = _place(targets, share, axis)
    chosen = jnp.take_along_axis(logits, jnp.clip(place, 0, share - 1)[:, None], axis=-1)[:, 0]
    sums = jnp.sum(weights, axis=-1), jnp.sum(weights * logits, axis=-1)
    if axis is not None:
        mine = (place >= 0) & (place < share)
        *sums, chosen = lax.psum((*sums, jnp.where(mine, chosen, jnp.float32(0))), axis)
    total, weighted = sums
    normaliser = largest[:, 0] + jnp.log(total)
    return chosen - normaliser, normaliser - weighted / total, normaliser


def _place(targets: Array, share: int, axis: str | None) -> Array:
    """Where a target is among a device's share of the vocabulary."""
    return targets - (0 if axis is None else lax.axis_index(axis) * share)


def _chunk_backward(
    operands: Operands, saved: tuple[Array, ...], gradients: Pair, axis: str | None, transposed: bool
) -> tuple[Array, Array]:
    hidden, head, targets, temperature, count = operands
    logits, normaliser, entropy = saved
    # Every device has the same results, each with its share of their gradient.
    gradients = gradients if axis is None else lax.psum(gradients, axis)
    # Rounded as the operands are: the sums stay in float32.
    d_logits = on_cpu(
        partial(jax_fused.logprobs_grad, dtype=hidden.dtype),
        partial(_of_logits_grad, axis=axis, dtype=hidden.dtype),
        logits, targets, temperature, count, normaliser, entropy, *gradients,
    )  # fmt: skip
    return _product_grad(hidden, head, d_logits, count, transposed)


def _of_logits_grad(
    logits: Array,
    targets: Array,
    temperature: Array,
    _: Array,
    normaliser: Array,
    entropy: Array,
    d_logp: Array,
    d_entropy: Array,
    axis: str | None,
    dtype: Any,
) -> Array:
    normaliser, entropy, d_logp, d_entropy = (x[:, None] for x in (normaliser, entropy, d_logp, d_entropy))
    share = logits.shape[1]
    chosen = _place(targets, share, axis)[:, None] == jnp.arange(share, dtype=targets.dtype)[None]
    logp = logits / temperature - normaliser
    d_scaled = jnp.where(chosen, d_logp, jnp.float32(0)) - jnp.exp(logp) * (d_logp + d_entropy * (logp + entropy))
    return (d_scaled / temperature).astype(dtype)


def _product(hidden: Array, head: Array, count: Array, transposed: bool) -> Array:
    """Logits, float32: eps of GSPO lies below the spacing of bfloat16 at 1.0."""

    def kernel(hidden: Array, head: Array, count: Array) -> Array:
        call = jax_binding.gmm_t if transposed else jax_binding.gmm
        return call(hidden, head[None], count[None], dtype=jnp.float32)

    def default(hidden: Array, head: Array, count: Array) -> Array:
        return contract(hidden, head, (1,), (1 if transposed else 0,))

    return on_cpu(kernel, default, hidden, head, count)


def _product_grad(hidden: Array, head: Array, g: Array, count: Array, transposed: bool) -> tuple[Array, Array]:
    def kernel(hidden: Array, head: Array, g: Array, count: Array) -> tuple[Array, Array]:
        call, outer = (jax_binding.gmm, (g, hidden)) if transposed else (jax_binding.gmm_t, (hidden, g))
        return call(g, head[None], count[None]), jax_binding.tgmm(*outer, count[None])[0]

    def default(hidden: Array, head: Array, g: Array, count: Array) -> tuple[Array, Array]:
        outer = (g, hidden) if transposed else (hidden, g)
        d_hidden = contract(g, head, (1,), (0 if transposed else 1,))
        return d_hidden.astype(hidden.dtype), contract_rows(*outer).astype(head.dtype)

    return on_cpu(kernel, default, hidden, head, g, count)
