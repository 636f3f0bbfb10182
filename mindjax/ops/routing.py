"""Which experts a token meets, with what weight, and the order of rows in which experts take theirs.

N tokens, or B rows of T; E experts, k choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_cuda import jax_fused
from mindjax.ops.dispatch import on_cpu

Array = jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def choose_experts(logits: Array, segment_ids: Array, choices: int, normalise: bool) -> tuple[Array, Array, Array]:
    """The likeliest experts of each token; of equal ones the lower number.

    Args:
      logits: [N, E] float32.
      segment_ids: [N] int32; 0 is padding, which chooses the expert past the last, with weight 0.
      choices: k.
      normalise: whether the weights of a token add up to 1.

    Returns:
      (weights [N, k] float32, chosen [N, k] int32, probabilities [N, E] float32, 0 in padding).
    """
    kernel = partial(jax_fused.choose_experts, choices=choices, normalise=normalise)
    return on_cpu(kernel, partial(_choose_experts, choices=choices, normalise=normalise), logits, segment_ids)


def _choose_experts(logits: Array, segment_ids: Array, choices: int, normalise: bool) -> tuple[Array, Array, Array]:
    real = (segment_ids > 0)[:, None]
    probabilities = jnp.where(real, jax.nn.softmax(logits, axis=-1), jnp.float32(0))
    # Not of the probabilities, whose rounding makes more of them equal.
    chosen = jax.lax.top_k(logits, choices)[1]
    weights = jnp.take_along_axis(probabilities, chosen, axis=-1)
    if normalise:
        weights = weights / jnp.where(real, jnp.sum(weights, axis=-1, keepdims=True), jnp.float32(1))
    return weights, jnp.where(real, chosen, logits.shape[1]), probabilities


def _choose_forward(logits: Array, segment_ids: Array, choices: int, normalise: bool) -> tuple:
    weights, chosen, probabilities = choose_experts(logits, segment_ids, choices, normalise)
    return (weights, chosen, probabilities), (chosen, probabilities)


def _choose_backward(choices: int, normalise: bool, saved: tuple[Array, Array], gradients: tuple) -> tuple:
    def default(chosen: Array, probabilities: Array, d_weights: Array, d_probabilities: Array) -> Array:
        taken = _taken(chosen, probabilities.shape[1])
        if normalise:
            weights = jnp.sum(jnp.where(taken, probabilities[:, None], jnp.float32(0)), axis=-1)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            total = jnp.where(total > 0, total, jnp.float32(1))  # of padding it is 0
            d_weights = (d_weights - jnp.sum(d_weights * weights, axis=-1, keepdims=True) / total) / total
        d = d_probabilities + jnp.sum(jnp.where(taken, d_weights[:, :, None], jnp.float32(0)), axis=1)
        return probabilities * (d - jnp.sum(d * probabilities, axis=-1, keepdims=True))

    kernel = partial(jax_fused.choose_experts_grad, normalise=normalise)
    chosen, probabilities = saved
    d_weights, _, d_probabilities = gradients
    d_logits = on_cpu(kernel, default, chosen, probabilities, d_weights, d_probabilities)
    return d_logits, np.zeros(chosen.shape[:1], jax.dtypes.float0)


choose_experts.defvjp(_choose_forward, _choose_backward)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByExpert:
    """Choices sorted by expert, those of one in the order of the tokens, what no expert has last.

    Attributes:
      token: [N k] int32, whose choice it is.
      back: [N, k] int32, where each choice lies.
      load: [E] int32, choices of each expert.
    """

    token: Array
    back: Array
    load: Array


def sort_by_expert(chosen: Array, weights: Array, experts: int) -> tuple[ByExpert, Array]:
    """Sorts `chosen` [N, k] int32, numbers of experts, others being nobody's.

    Returns:
      (the order; `weights` [N, k] float32 in it, [N k]).
    """
    token, back, load, scales = _sort_by_expert(chosen, weights, experts)
    return ByExpert(token, back, load), scales


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sort_by_expert(chosen: Array, weights: Array, experts: int) -> tuple[Array, Array, Array, Array]:
    def default(chosen: Array, weights: Array) -> tuple[Array, Array, Array, Array]:
        flat = chosen.reshape(-1)
        flat = jnp.where((flat >= 0) & (flat < experts), flat, experts)
        order = jnp.argsort(flat, stable=True)
        load = jnp.sum(_taken(flat, experts), axis=0, dtype=jnp.int32)
        return order // chosen.shape[1], jnp.argsort(order).reshape(chosen.shape), load, weights.reshape(-1)[order]

    return on_cpu(partial(jax_fused.sort_by_expert, experts=experts), default, chosen, weights)


def _sort_forward(chosen: Array, weights: Array, experts: int) -> tuple:
    out = _sort_by_expert(chosen, weights, experts)
    return out, out[1]


def _sort_backward(experts: int, back: Array, gradients: tuple) -> tuple[np.ndarray, Array]:
    return np.zeros(back.shape, jax.dtypes.float0), gradients[3][back]


_sort_by_expert.defvjp(_sort_forward, _sort_backward)


def expert_shares(chosen: Array, segment_ids: Array, experts: int) -> Array:
    """What multiplies a token's probabilities in the balance loss.

    Args:
      chosen: [B, T, k] int32.
      segment_ids: [B, T] int32; each run of one id is a sequence, 0 is padding.
      experts: E.

    Returns:
      [B, T, E] float32, how often the token's sequence chose the expert over the square of the sequence's length; 0 in
      padding.
    """
    # Made of integers alone: there is nothing to differentiate.
    return on_cpu(
        partial(jax_fused.expert_shares, experts=experts), partial(_expert_shares, experts=experts), chosen, segment_ids
    )


def _expert_shares(chosen: Array, segment_ids: Array, experts: int) -> Array:
    rows, time = segment_ids.shape
    place = jnp.arange(time, dtype=jnp.int32)[None]
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((rows, 1), bool)
    is_first, is_last = jnp.concatenate([edge, changes], axis=1), jnp.concatenate([changes, edge], axis=1)
    first = jax.lax.cummax(jnp.where(is_first, place, 0), axis=1)
    last = jax.lax.cummin(jnp.where(is_last, place, time - 1), axis=1, reverse=True)
    lengths = (last - first + 1).astype(jnp.float32)[:, :, None]
    # Each token's sequence total as a difference of running sums: exact in float32 below 2^24 tokens a row, where a
    # scatter runs one token at a time on a CPU.
    taken = jnp.sum(_taken(chosen, experts), axis=2, dtype=jnp.float32)
    running = jnp.pad(jnp.cumsum(taken, axis=1), ((0, 0), (1, 0), (0, 0)))
    totals = jnp.take_along_axis(running, last[:, :, None] + 1, axis=1)
    totals -= jnp.take_along_axis(running, first[:, :, None], axis=1)
    return jnp.where((segment_ids > 0)[:, :, None], totals / lengths**2, jnp.float32(0))


def _taken(chosen: Array, experts: int) -> Array:
    """[...] numbers of experts as [..., E] bool: a scatter would run one row at a time on a CPU."""
    return chosen[..., None] == jax.lax.broadcasted_iota(chosen.dtype, (*chosen.shape, experts), chosen.ndim)
