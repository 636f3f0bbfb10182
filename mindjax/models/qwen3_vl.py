"""Qwen3-VL, dense and mixture-of-experts: one pure, jittable forward for text, images, video and packed mixtures.

Shape suffixes: B rows, T tokens, H hidden, V vocabulary, M merged vision tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mindjax.config import ModelConfig, TextConfig
from mindjax.models.attention import Attend, TextAttention, row_attention, text_attention
from mindjax.models.mlp import MLP, mlp
from mindjax.models.moe import MoE, RouterStats, moe
from mindjax.models.parameters import LOGICAL_AXES, Init, map_parameters, pure_dict
from mindjax.models.rope import text_rope
from mindjax.models.spread import check_model, parameter_axes, spread
from mindjax.models.vision import VisionEncoder, VisionFeatures, encode
from mindjax.ops.logprobs import token_logprobs as head_logprobs
from mindjax.ops.matmul import matmul, matmul_transposed
from mindjax.ops.norm import rms_norm
from mindjax.ops.scan import loops, scan_layers, unstack
from mindjax.types import Batch, VisionInputs
from sharding.links import ONE_DEVICE, Links
from sharding.parallel import Parallel
from sharding.pipeline import pipeline
from sharding.remat import Remat, rematerialise

Params = dict[str, Any]


class TextLayers(nnx.Module):
    """All layers, stacked on a leading layer axis."""

    def __init__(self, init: Init, config: TextConfig):
        layer, norm = ("layer", config.num_hidden_layers), ("norm", config.hidden_size)
        self.input_norm = init.constant(1.0, layer, norm)
        self.post_attention_norm = init.constant(1.0, layer, norm)
        self.attn = TextAttention(init, config)
        if config.num_experts:
            self.moe = MoE(init, config)
        else:
            self.mlp = MLP(init, config)


class TextModel(nnx.Module):
    def __init__(self, init: Init, config: ModelConfig):
        vocab, embed = ("vocab", config.text.vocab_size), ("embed", config.text.hidden_size)
        self.embed = init.normal(vocab, embed)
        self.layers = TextLayers(init, config.text)
        self.norm = init.constant(1.0, ("norm", config.text.hidden_size))
        if not config.tie_word_embeddings:
            self.head = init.normal(embed, vocab)


class Qwen3VL(nnx.Module):
    """The parameters of a whole model, each with its logical axes."""

    def __init__(self, config: ModelConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32):
        init = Init(key, dtype, config.initializer_range)
        self.vision = VisionEncoder(init, config.vision)
        self.text = TextModel(init, config)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """Of one forward pass.

    Attributes:
      hidden: [B, T, H] after the final norm.
      router: statistics stacked over layers, None for a dense model.
      state: what `attend` returned, stacked over layers (the new keys and values, for a prefill).
    """

    hidden: jax.Array
    router: RouterStats | None
    state: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenLogprobs:
    """Of the tokens of a batch, each given what stands before it in its segment.

    Attributes:
      logp: [B, T] float32, 0 at the first token of a segment, in padding and where a mask leaves tokens out.
      entropy: [B, T] float32, of the distribution that the token was drawn from, 0 likewise.
      router: see `Output`.
    """

    logp: jax.Array
    entropy: jax.Array
    router: RouterStats | None


def init(config: ModelConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
    """Random parameters: N(0, initializer_range) weights, unit norms, zero biases, as transformers starts them."""
    return jax.jit(lambda key: pure_dict(Qwen3VL(config, key, dtype)))(key)


def abstract_params(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Params:
    """Shapes and dtypes of the parameters, without memory."""
    return jax.eval_shape(lambda key: pure_dict(Qwen3VL(config, key, dtype)), jax.random.key(0))


def logical_axes(config: ModelConfig) -> Params:
    """The logical axis names of every parameter, as a tree of tuples."""
    model = nnx.eval_shape(lambda key: Qwen3VL(config, key), jax.random.key(0))
    return map_parameters(model, lambda parameter: parameter.get_metadata()[LOGICAL_AXES])


def shardings(config: ModelConfig, parallel: Parallel) -> Params:
    """Where every parameter lies, as a tree of `NamedSharding`s.

    Raises:
      ValueError: the model does not divide by the layout.
    """
    check_model(config, parallel.layout)
    return parallel.shardings(parameter_axes(logical_axes(config), config, parallel))


def encode_vision(
    params: Params,
    config: ModelConfig,
    vision: VisionInputs,
    *,
    remat: Remat = "none",
    links: Links = ONE_DEVICE,
    axes: Params | None = None,
) -> VisionFeatures:
    """Runs the vision encoder alone; `forward` takes the result as `vision_features`. See there for the arguments."""
    return encode(params["vision"], vision, config.vision, remat, links, axes and axes["vision"])


def forward(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    vision_features: VisionFeatures | None = None,
    remat: Remat = "none",
    keep_kv: bool = False,
    links: Links = ONE_DEVICE,
    axes: Params | None = None,
) -> Output:
    """The whole model on packed rows.

    Args:
      params: nested dict; its dtype is the compute dtype. With several devices, this one's parts.
      batch: see `Batch`; `batch.vision` None with `vision_features` None is a batch of text alone.
      vision_features: of an earlier `encode_vision`, used instead of encoding `batch.vision`.
      remat: what a block keeps for the backward pass.
      keep_kv: whether `Output.state` holds the keys and values of every layer, [layers, B, T, K, D] each.
      links: to the other devices, inside `jax.shard_map`.
      axes: logical axes of the parameters (`Parallel.logical_axes`); not read on one device.

    Returns:
      hidden states after the final norm, and router statistics. With several devices [B, T / (sequence x tensor), H],
      zero but on the last stage, and the statistics of the stage's layers.
    """
    text, text_axes = params["text"], axes and axes["text"]
    if vision_features is None and batch.vision is not None:
        vision_features = _whole_features(params, config, batch, remat, links, axes)
    x = embed(links.weights(text["embed"], text_axes and text_axes["embed"]), batch.tokens, links)
    gathers = links.layout.fsdp > 1
    loop = loops(config.text.num_hidden_layers, remat != "none" or gathers or links.layout.stage > 1)
    deepstack: Any = []
    places = None
    if vision_features is not None:
        index = links.own_tokens(batch.vision_index)
        places = (index >= 0)[..., None]
        tokens, *deepstack = _place(vision_features, index)
        x = jnp.where(places, tokens, x)
    if deepstack and loop:
        deepstack = jnp.stack(deepstack)
    # What the layers read of the rows beside x.
    beside = (text_rope(batch.positions, config.text), batch.segment_ids, deepstack, places)

    def block(x: jax.Array, layer: tuple[Params, jax.Array], beside: Any) -> tuple[jax.Array, Any]:
        p, index = layer
        rope, segments, deepstack, places = beside

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            return row_attention(q, k, v, segments, links), (k, v) if keep_kv else None

        p = links.weights(p, text_axes and text_axes["layers"])
        x, router, state = decoder_layer(p, x, rope, segments, config.text, attend, links)
        if len(deepstack):
            x = _add_deepstack(x, deepstack, index, places)
        return x, (router, state)

    if links.layout.stage > 1:
        x, router = _through_stages(block, x, beside, text["layers"], remat, links)
        state = None
    else:
        layers = (text["layers"], np.arange(config.text.num_hidden_layers, dtype=np.int32))
        layer = rematerialise(partial(block, beside=beside), remat, gathers=gathers)
        x, (router, state) = scan_layers(layer, x, layers, loop=loop)
    return Output(rms_norm(x, text["norm"], config.text.rms_norm_eps), router, state)


def _through_stages(
    block: Callable[..., Any], x: jax.Array, beside: Any, layers: Params, remat: Remat, links: Links
) -> tuple[jax.Array, RouterStats | None]:
    """The layers as a pipeline, see `sharding.pipeline`; `layers` are those of this stage, [1, round, size, ...]."""
    layout = links.layout
    parts = layout.microbatches

    def split(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(parts, -1, *leaf.shape[1:])

    rope, segments, deepstack, places = beside
    # The levels of DeepStack come before the rows.
    levels = jnp.moveaxis(deepstack, 0, 1) if len(deepstack) else None
    cut = jax.tree.map(split, (rope, segments, levels, places))
    size = jax.tree.leaves(layers)[0].shape[2]

    def run(x: jax.Array, number: jax.Array, turn: jax.Array) -> tuple[jax.Array, Any]:
        rope, segments, levels, places = jax.tree.map(lambda leaf: leaf[number], cut)
        beside: Any = (rope, segments, [] if levels is None else jnp.moveaxis(levels, 1, 0), places)
        first = (turn * layout.stage + links.index("stage")) * size
        index = first + jnp.arange(size, dtype=jnp.int32)

        def layer(x: jax.Array, layer: tuple[Params, jax.Array]) -> tuple[jax.Array, Any]:
            x, (router, _) = block(x, layer, beside)
            return x, router

        here = jax.tree.map(lambda leaf: leaf[0, turn], layers)
        return scan_layers(rematerialise(layer, remat, gathers=layout.fsdp > 1), x, (here, index))

    x, router = pipeline(run, split(x), stages=layout.stage, microbatches=parts, rounds=layout.pipeline_rounds)
    return x.reshape(-1, *x.shape[2:]), router


def _whole_features(
    params: Params, config: ModelConfig, batch: Batch, remat: Remat, links: Links, axes: Params | None
) -> VisionFeatures:
    """The pictures of this device's rows, encoded by all devices that share these."""
    assert batch.vision is not None
    features = encode_vision(params, config, batch.vision, remat=remat, links=links, axes=axes)
    over = ("stage", "sequence", "tensor")
    return VisionFeatures(links.gather(features.tokens, over, 0), links.gather(features.deepstack, over, 1))


def embed(table: jax.Array, tokens: jax.Array, links: Links) -> jax.Array:
    """[B, T / sequence] int32 to the embeddings [B, t, H] of this device's tokens; `table` is its share of the rows."""
    if links.layout.tensor == 1:
        return table[tokens]
    place = tokens - links.index("tensor") * table.shape[0]
    mine = (place >= 0) & (place < table.shape[0])
    found = jnp.where(mine[..., None], table[jnp.clip(place, 0, table.shape[0] - 1)], jnp.zeros((), table.dtype))
    return links.sum_tokens(found)


def decoder_layer(
    p: Params,
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segment_ids: jax.Array,
    config: TextConfig,
    attend: Attend,
    links: Links = ONE_DEVICE,
) -> tuple[jax.Array, RouterStats | None, Any]:
    """One layer on x [B, t, H]: the same code for training, prefill and decoding, which differ in `attend` alone."""
    normed = links.all_tokens(rms_norm(x, p["input_norm"], config.rms_norm_eps))
    out, state = text_attention(p["attn"], normed, rope, config, attend, links)
    x = x + links.sum_tokens(out)
    normed = links.all_tokens(rms_norm(x, p["post_attention_norm"], config.rms_norm_eps))
    if config.num_experts:
        out, router = moe(p["moe"], normed, segment_ids, config, links)
        return x + links.sum_tokens(out), router, state
    return x + links.sum_tokens(mlp(p["mlp"], normed)), None, state


def logits(params: Params, hidden: jax.Array, links: Links = ONE_DEVICE) -> jax.Array:
    """[..., H] to float32 [..., V], the vocabulary of all devices."""
    text = params["text"]
    if "head" in text:
        scores = matmul(hidden, text["head"], dtype=jnp.float32)
    else:
        scores = matmul_transposed(hidden, text["embed"], dtype=jnp.float32)
    return links.gather(scores, ("tensor",), scores.ndim - 1)


def token_logprobs(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    mask: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    vision_features: VisionFeatures | None = None,
    remat: Remat = "none",
    parallel: Parallel | None = None,
) -> TokenLogprobs:
    """Log-probability of tokens given their past, under the distribution at `temperature`.

    Args:
      params, config, batch, vision_features, remat: see `forward`.
      mask: [B, T], above 0 at the tokens that are wanted, all by default. The others get 0; the head, a fifth of the
        work of a small model with a large vocabulary, is not computed for them.
      temperature: > 0.
      parallel: the devices to spread it over; None for one.

    Raises:
      ValueError: the model or the batch does not divide by the layout, or the temperature is not positive.
    """
    if not isinstance(temperature, jax.Array) and temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}; greedy decoding has no log-probabilities")
    wanted = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] != 0)
    if mask is not None:
        wanted &= mask[:, 1:] > 0
    # The last column predicts nothing; it stays, so that the shape is a bucket's and not a bucket's less one.
    targets = jnp.pad(jnp.where(wanted, batch.tokens[:, 1:], -1), ((0, 0), (0, 1)), constant_values=-1)
    temperature = jnp.asarray(temperature, jnp.float32)
    predict = partial(_predictions, config=config, remat=remat)
    if parallel is None:
        logp, entropy, router = predict(params, batch, targets, temperature, vision_features, links=ONE_DEVICE)
    else:
        logp, entropy, router = spread(
            predict, params, logical_axes(config), config, batch, targets, temperature, vision_features, parallel
        )
    return TokenLogprobs(_shift_right(logp), _shift_right(entropy), router)


def _predictions(
    params: Params,
    batch: Batch,
    targets: jax.Array,
    temperature: jax.Array,
    vision_features: VisionFeatures | None,
    *,
    config: ModelConfig,
    remat: Remat,
    links: Links,
    axes: Params | None = None,
) -> tuple[jax.Array, jax.Array, RouterStats | None]:
    """(log-probability of targets, entropy of what they are drawn from, [B, T / sequence] each, router statistics)."""
    output = forward(params, config, batch, vision_features=vision_features, remat=remat, links=links, axes=axes)
    text = params["text"]
    name = "head" if "head" in text else "embed"
    matrix = links.weights(text[name], axes and axes["text"][name])
    hidden, targets = links.head_tokens(output.hidden), links.head_targets(targets)
    logp, entropy = head_logprobs(
        hidden.reshape(targets.size, -1),
        matrix,
        targets.reshape(-1),
        temperature=temperature,
        axis="tensor" if links.layout.tensor > 1 else None,
        transposed=name == "embed",
    )
    logp, entropy = (links.from_head(x.reshape(targets.shape)) for x in (logp, entropy))
    return logp, entropy, output.router


def _shift_right(values: jax.Array) -> jax.Array:
    """Moves what position t - 1 predicted to t."""
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))


def _place(features: VisionFeatures, vision_index: jax.Array) -> list[jax.Array]:
    """Tokens and DeepStack levels at their places in the rows, [B, T, H] each; the caller masks text."""
    index = jnp.maximum(vision_index, 0)
    return [level[index] for level in (features.tokens, *unstack(features.deepstack))]


def _add_deepstack(x: jax.Array, deepstack: Any, layer: Any, places: jax.Array) -> jax.Array:
    """Adds level `layer` of the DeepStack features in the first layers, nothing in the others.

    Args:
      deepstack: [levels, B, T, H], or a list where `layer` is known.
    """

    def add(x: jax.Array, level: jax.Array) -> jax.Array:
        return x + jnp.where(places, level, jnp.zeros((), x.dtype))

    if isinstance(deepstack, list):
        return add(x, deepstack[layer]) if layer < len(deepstack) else x
    return jax.lax.cond(
        layer < deepstack.shape[0],
        lambda x: add(x, jax.lax.dynamic_index_in_dim(deepstack, layer, keepdims=False)),
        lambda x: x,
        x,
    )
