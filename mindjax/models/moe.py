"""The mixture of experts of Qwen3-VL-MoE: router, dropless dispatch, expert products, combine.

B rows, T tokens, H hidden size, E experts, k experts per token, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from mindjax.ops.routing import ByExpert, choose_experts, expert_shares, sort_by_expert
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
    # float32: small differences of router logits decide which expert a token meets.
    logits = matmul(flat, params["router"], dtype=jnp.float32)
    weights, chosen, probabilities = choose_experts(logits, segment_ids.reshape(tokens), choices, config.norm_topk_prob)
    # transformers weighs in the model's dtype, the published models were trained so.
    dtype = jnp.finfo(x.dtype)
    weights = jax.lax.reduce_precision(weights, dtype.nexp, dtype.nmant)

    order, scales = sort_by_expert(chosen, weights, experts)
    if links.layout.expert > 1 and travels(links.layout, choices):
        y = _by_travel(params, flat, scales, order, Journey.of(order.load, links.layout.expert))
    elif links.layout.expert > 1:
        y = _by_share(params, flat, chosen, weights, experts // links.layout.expert, links)
    else:
        y = _answers(params, flat, scales, order)

    aux_sum, aux_count = _balance_loss(
        probabilities.reshape(rows, time, experts), chosen.reshape(rows, time, choices), segment_ids, links
    )
    return y.reshape(x.shape), RouterStats(*links.sum_batch((order.load.astype(jnp.float32), aux_sum, aux_count)))


def _answers(params: dict[str, Array], x: Array, scales: Array, order: ByExpert) -> Array:
    """The answers of experts to tokens x [N, H], weighted by `scales` [N k] in their order and summed: [N, H].

    Choices past the last group get zeros.
    """
    # Weighed before the last product, which is linear: then the gradient of the weights needs no answer kept.
    answers = _products(params, _dispatch(x, order.token, order.back), scales, order.load)
    return _combine(answers, order.token, order.back)


def _products(params: dict[str, Array], rows: Array, scales: Array, group_sizes: Array) -> Array:
    """Weighted answers to rows [R, H] that are sorted by expert, with float32 weights [R]."""
    hidden = checkpoint_name(grouped_matmul(rows, params["gate_up"], group_sizes), "mlp_hidden")
    return grouped_matmul(swiglu(hidden, scales), params["down"], group_sizes)


def _by_share(params: dict[str, Array], x: Array, chosen: Array, weights: Array, count: int, links: Links) -> Array:
    """What the experts of all devices, `count` on each, answer to this device's tokens, of which all get a copy."""
    x, chosen, weights = (links.gather(part, ("expert",), 0) for part in (x, chosen, weights))
    order, scales = sort_by_expert(chosen - links.index("expert") * count, weights, count)
    return links.scatter_sum(_answers(params, x, scales, order), "expert", 0)


def _by_travel(params: dict[str, Array], x: Array, scales: Array, order: ByExpert, journey: Journey) -> Array:
    """What the experts of all devices answer to this device's tokens, which travel to them and back."""
    rows = _dispatch(x, order.token, order.back)
    # The most that can come: all choices of all tokens, or as many as the experts here can be chosen for.
    experts = len(journey.group_sizes)
    size = journey.devices * len(x) * min(order.back.shape[1], experts)
    there = _products(params, journey.go(rows, size), journey.go(scales, size), journey.group_sizes)
    return _combine(journey.back(there, len(rows)), order.token, order.back)


# Gradients of gathers are scatters, which run one row at a time on a CPU; each of these two is the other's.


@jax.custom_vjp
def _dispatch(x: Array, token: Array, back: Array) -> Array:
    """A copy of each token of x [N, H] for each of its choices, in the order of experts: [N k, H]."""
    return on_cpu(jax_binding.permute, lambda x, index: x[index], x, token)


@jax.custom_vjp
def _combine(answers: Array, token: Array, back: Array) -> Array:
    """The sum over each token's choices, [N, H]; the transpose of `_dispatch`."""
    return on_cpu(jax_binding.unpermute, lambda x, index: jnp.sum(x[index], axis=1), answers, back)


_dispatch.defvjp(
    lambda x, token, back: (_dispatch(x, token, back), (token, back)),
    lambda saved, g: (_combine(g, *saved), *_no_gradient(saved)),
)
_combine.defvjp(
    lambda answers, token, back: (_combine(answers, token, back), (token, back)),
    lambda saved, g: (_dispatch(g, *saved), *_no_gradient(saved)),
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
    shares = expert_shares(chosen, segment_ids, experts)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True) & (segment_ids > 0)
    if own is not None:
        shares, begins = shares[:, own], begins[:, own]
    return experts * jnp.sum(shares * probabilities), jnp.sum(begins, dtype=jnp.float32)
