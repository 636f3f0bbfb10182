"""The mixture of experts of Qwen3-VL-MoE: router, dropless dispatch, expert products, combine.

B rows, T tokens, H hidden size, E experts, k experts per token, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kernels_cuda import jax_binding
from mindjax.config import TextConfig
from mindjax.models.parameters import Init
from mindjax.ops.activation import swiglu
from mindjax.ops.dispatch import on_cpu
from mindjax.ops.grouped_matmul import grouped_matmul
from mindjax.ops.matmul import matmul
from sharding.expert import Journey, travels
from sharding.links import ONE_DEVICE, Links

Array = jax.Array


class MoE(nnx.Module):
    """Router and experts, stacked over layers."""

    def __init__(self, init: Init, config: TextConfig):
        layer, embed = ("layer", config.num_hidden_layers), ("embed", config.hidden_size)
        expert, hidden = ("expert", config.num_experts), config.moe_intermediate_size
        self.router = init.normal(layer, embed, ("router", config.num_experts))
        self.gate_up = init.normal(layer, expert, embed, ("expert_mlp", 2 * hidden))
        self.down = init.normal(layer, expert, ("expert_mlp", hidden), embed)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterStats:
    """What one layer's router did.

    Attributes:
      load: [E] float32, (token, choice) pairs that each expert received, padding excluded.
      aux_sum: scalar float32, the load-balancing loss summed over sequences; its gradient reaches the router.
      aux_count: scalar float32, the number of sequences.
    """

    load: Array
    aux_sum: Array
    aux_count: Array


def moe(
    params: dict[str, Array], x: Array, segment_ids: Array, config: TextConfig, links: Links = ONE_DEVICE
) -> tuple[Array, RouterStats]:
    """Sends each token to its top-k experts and adds their answers, weighted; no token is dropped.

    Args:
      params: router [H, E], gate_up [E, H, 2 I] (gate first, then up), down [E, I, H]; of E and I a device's share.
      x: [B, T, H].
      segment_ids: [B, T] int32; each run of one id in a row is a sequence, 0 is padding, which is neither routed
        nor counted and gets a zero answer.
      config: reads num_experts, num_experts_per_tok, norm_topk_prob.
      links: to the devices that have the other experts.

    Returns:
      (y [B, T, H] in the dtype of `x`, a summand where I is split; RouterStats over the rows of all devices).
    """
    rows, time, hidden = x.shape
    tokens = rows * time  # of this device
    experts, choices = config.num_experts, config.num_experts_per_tok
    flat = x.reshape(tokens, hidden)
    real = segment_ids.reshape(tokens) > 0

    # float32: small differences of router logits decide which expert a token meets.
    probabilities = jax.nn.softmax(matmul(flat, params["router"], dtype=jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, choices)
    if config.norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    # transformers weighs in the model's dtype, the published models were trained so.
    weights = jnp.where(real[:, None], weights, 0.0).astype(x.dtype)

    # Padding goes to an expert past the last.
    chosen = jnp.where(real[:, None], chosen, experts)
    taken = _taken(chosen, experts)
    load = jnp.sum(taken, axis=0, dtype=jnp.int32)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    if links.layout.expert > 1 and travels(links.layout, choices):
        y = _by_travel(params, flat, weights, order, Journey.of(load, links.layout.expert))
    elif links.layout.expert > 1:
        y = _by_share(params, flat, chosen, weights, experts // links.layout.expert, links)
    else:
        y = _answers(params, flat, weights, order, load)

    aux_sum, aux_count = _balance_loss(
        probabilities.reshape(rows, time, experts), chosen.reshape(rows, time, choices), segment_ids, links
    )
    return y.reshape(x.shape), RouterStats(*links.sum_batch((load.astype(jnp.float32), aux_sum, aux_count)))


def _answers(params: dict[str, Array], x: Array, weights: Array, order: Array, group_sizes: Array) -> Array:
    """The weighted answers of experts to tokens x [N, H] with `weights` [N, k], summed over the choices: [N, H].

    Args:
      order: [N k], choices sorted by expert; those past the last group get zeros.
      group_sizes: [E] int32, choices of each expert.
    """
    back = jnp.argsort(order)
    rows = _dispatch(x, order, back, weights.shape[1])
    # Weighed before the last product, which is linear: then the gradient of the weights needs no answer kept.
    answers = _products(params, rows, _permute(weights.reshape(-1), order, back), group_sizes)
    return _combine(answers, order, back, weights.shape[1])


def _products(params: dict[str, Array], rows: Array, weights: Array, group_sizes: Array) -> Array:
    """Weighted answers to rows [R, H] that are sorted by expert, with weights [R]."""
    hidden = checkpoint_name(grouped_matmul(rows, params["gate_up"], group_sizes), "mlp_hidden")
    return grouped_matmul(swiglu(hidden, weights.astype(jnp.float32)), params["down"], group_sizes)


def _by_share(params: dict[str, Array], x: Array, chosen: Array, weights: Array, count: int, links: Links) -> Array:
    """What the experts of all devices, `count` on each, answer to this device's tokens, of which all get a copy."""
    x, chosen, weights = (links.gather(part, ("expert",), 0) for part in (x, chosen, weights))
    chosen = chosen - links.index("expert") * count
    chosen = jnp.where((chosen >= 0) & (chosen < count), chosen, count)
    group_sizes = jnp.sum(_taken(chosen, count), axis=0, dtype=jnp.int32)
    answers = _answers(params, x, weights, jnp.argsort(chosen.reshape(-1), stable=True), group_sizes)
    return links.scatter_sum(answers, "expert", 0)


def _by_travel(params: dict[str, Array], x: Array, weights: Array, order: Array, journey: Journey) -> Array:
    """What the experts of all devices answer to this device's tokens, which travel to them and back."""
    choices, back = weights.shape[1], jnp.argsort(order)
    rows, scales = _dispatch(x, order, back, choices), _permute(weights.reshape(-1), order, back)
    # The most that can come: all choices of all tokens, or as many as the experts here can be chosen for.
    experts = len(journey.group_sizes)
    size = journey.devices * len(x) * min(choices, experts)
    there = _products(params, journey.go(rows, size), journey.go(scales, size), journey.group_sizes)
    return _combine(journey.back(there, len(rows)), order, back, choices)


def _taken(chosen: Array, experts: int) -> Array:
    """[N, k] numbers of experts as [N, E] bool."""
    return (chosen[:, :, None] == jnp.arange(experts, dtype=chosen.dtype)[None, None]).any(axis=1)


# Gradients of gathers are scatters, which run one row at a time on a CPU; that of a permutation is its inverse.


@jax.custom_vjp
def _permute(x: Array, order: Array, back: Array) -> Array:
    """Rows of x [R, ...] in the order [R], whose inverse is `back` [R]."""
    return x[order]


_permute.defvjp(lambda x, order, back: (x[order], (order, back)), lambda saved, g: (g[saved[1]], *_no_gradient(saved)))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(x: Array, order: Array, back: Array, choices: int) -> Array:
    """A copy of each token of x [N, H] for each of its choices, in the order of experts: [N choices, H]."""
    return on_cpu(jax_binding.permute, lambda x, index: x[index], x, order // choices)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(answers: Array, order: Array, back: Array, choices: int) -> Array:
    """The sum over each token's choices, [N, H]; the transpose of `_dispatch`."""

    def default(answers: Array, back: Array) -> Array:
        return jnp.sum(answers[back.reshape(-1)].reshape(*back.shape, -1), axis=1)

    return on_cpu(jax_binding.unpermute, default, answers, back.reshape(-1, choices))


_dispatch.defvjp(
    lambda x, order, back, choices: (_dispatch(x, order, back, choices), (order, back)),
    lambda choices, saved, g: (_combine(g, *saved, choices), *_no_gradient(saved)),
)
_combine.defvjp(
    lambda answers, order, back, choices: (_combine(answers, order, back, choices), (order, back)),
    lambda choices, saved, g: (_dispatch(g, *saved, choices), *_no_gradient(saved)),
)


def _no_gradient(indices: tuple[Array, ...]) -> list[np.ndarray]:
    return [np.zeros(index.shape, jax.dtypes.float0) for index in indices]


def _balance_loss(probabilities: Array, chosen: Array, segment_ids: Array, links: Links) -> tuple[Array, Array]:
    """The load-balancing loss of Switch Transformers (arXiv:2101.03961, eq. 4 to 6), per sequence.

    E sum_e f_e P_e with f_e the share of the sequence's tokens that chose e (the f_e sum to k, as transformers
    has it, so that published coefficients keep their meaning) and P_e its mean router probability. A mean over
    the whole batch would not add up over micro-batches; a sum over sequences does.

    Args:
      probabilities: [B, T, E].
      chosen: [B, T, k].
      segment_ids: [B, T].
      links: to the devices that have the other tokens of these rows.

    Returns:
      (sum over tokens of their share, number of sequences that begin here).
    """
    experts = probabilities.shape[-1]
    # What a sequence chose is counted over whole rows, of which the numbers of experts are little to send.
    own = links.row_places(segment_ids.shape[1])
    segment_ids, chosen = links.whole_rows(segment_ids), links.whole_rows(chosen)
    rows, time = segment_ids.shape
    taken = _taken(chosen.reshape(rows * time, -1), experts)
    place = jnp.arange(time, dtype=jnp.int32)[None]
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((rows, 1), bool)
    is_first, is_last = jnp.concatenate([edge, changes], axis=1), jnp.concatenate([changes, edge], axis=1)
    first = jax.lax.cummax(jnp.where(is_first, place, 0), axis=1)
    last = jax.lax.cummin(jnp.where(is_last, place, time - 1), axis=1, reverse=True)
    lengths = (last - first + 1).astype(jnp.float32)[:, :, None]
    # Each token's sequence total as a difference of running sums: exact in float32 below 2^24 tokens a row, and
    # linear, where a scatter runs one token at a time on a CPU.
    running = jnp.pad(
        jnp.cumsum(taken.reshape(rows, time, experts).astype(jnp.float32), axis=1), ((0, 0), (1, 0), (0, 0))
    )
    totals = jnp.take_along_axis(running, last[:, :, None] + 1, axis=1)
    totals -= jnp.take_along_axis(running, first[:, :, None], axis=1)
    if own is not None:
        totals, lengths, segment_ids, is_first = (x[:, own] for x in (totals, lengths, segment_ids, is_first))
    real = segment_ids > 0
    per_token = experts * jnp.sum(totals * probabilities / lengths**2, axis=-1)
    count = jnp.sum(is_first & real, dtype=jnp.float32)
    return jnp.sum(jnp.where(real, per_token, jnp.float32(0))), count
