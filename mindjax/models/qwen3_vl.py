"""Qwen3-VL, dense and mixture-of-experts: one pure, jittable forward for text, images, video and packed mixtures.

Shape suffixes: B rows, T tokens, H hidden, V vocabulary, M merged vision tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mindjax.config import ModelConfig, TextConfig
from mindjax.models.attention import Attend, TextAttention, text_attention
from mindjax.models.mlp import MLP, mlp
from mindjax.models.moe import MoE, RouterStats, moe
from mindjax.models.parameters import LOGICAL_AXES, Init, map_parameters, pure_dict
from mindjax.models.rope import text_rope
from mindjax.models.vision import VisionEncoder, VisionFeatures, encode
from mindjax.ops.attention import attention
from mindjax.ops.logprobs import token_logprobs as head_logprobs
from mindjax.ops.matmul import matmul, matmul_transposed
from mindjax.ops.norm import rms_norm
from mindjax.ops.scan import scan_layers
from mindjax.types import Batch, VisionInputs
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
      logp: [B, T] float32, 0 at the first token of a segment and in padding.
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


def encode_vision(
    params: Params, config: ModelConfig, vision: VisionInputs, *, remat: Remat = "none"
) -> VisionFeatures:
    """Runs the vision encoder alone; `forward` takes the result as `vision_features`."""
    return encode(params["vision"], vision, config.vision, remat)


def forward(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    vision_features: VisionFeatures | None = None,
    remat: Remat = "none",
    keep_kv: bool = False,
) -> Output:
    """The whole model on packed rows.

    Args:
      params: nested dict; its dtype is the compute dtype.
      batch: see `Batch`; `batch.vision` None with `vision_features` None is a batch of text alone.
      vision_features: of an earlier `encode_vision`, used instead of encoding `batch.vision`.
      remat: what a block keeps for the backward pass.
      keep_kv: whether `Output.state` holds the keys and values of every layer, [layers, B, T, K, D] each.

    Returns:
      hidden states after the final norm, and router statistics.
    """
    if vision_features is None and batch.vision is not None:
        vision_features = encode_vision(params, config, batch.vision, remat=remat)
    x = params["text"]["embed"][batch.tokens]
    if vision_features is not None:
        places = (batch.vision_index >= 0)[..., None]
        placed = _place(vision_features, batch.vision_index)
        x, deepstack = jnp.where(places, placed[0], x), placed[1:]
    segments = batch.segment_ids

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        out = attention(q, k, v, q_segment_ids=segments, kv_segment_ids=segments, causal=True)
        return out, (k, v) if keep_kv else None

    rope = text_rope(batch.positions, config.text)

    def block(x: jax.Array, layer: tuple[Params, jax.Array]) -> tuple[jax.Array, Any]:
        p, index = layer
        x, router, state = decoder_layer(p, x, rope, segments, config.text, attend)
        if vision_features is not None and len(deepstack):
            x = _add_deepstack(x, deepstack, index, places)
        return x, (router, state)

    layers = (params["text"]["layers"], jnp.arange(config.text.num_hidden_layers, dtype=jnp.int32))
    x, (router, state) = scan_layers(rematerialise(block, remat), x, layers)
    return Output(rms_norm(x, params["text"]["norm"], config.text.rms_norm_eps), router, state)


def decoder_layer(
    p: Params,
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segment_ids: jax.Array,
    config: TextConfig,
    attend: Attend,
) -> tuple[jax.Array, RouterStats | None, Any]:
    """One layer on x [B, T, H]: the same code for training, prefill and decoding, which differ in `attend` alone."""
    out, state = text_attention(p["attn"], rms_norm(x, p["input_norm"], config.rms_norm_eps), rope, config, attend)
    x = x + out
    normed = rms_norm(x, p["post_attention_norm"], config.rms_norm_eps)
    if config.num_experts:
        out, router = moe(p["moe"], normed, segment_ids, config)
        return x + out, router, state
    return x + mlp(p["mlp"], normed), None, state


def head(params: Params) -> jax.Array:
    """The output matrix [H, V], the embedding table itself where the two are tied."""
    text = params["text"]
    return text["head"] if "head" in text else text["embed"].T


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """[..., H] to float32 [..., V]."""
    text = params["text"]
    if "head" in text:
        return matmul(hidden, text["head"], dtype=jnp.float32)
    return matmul_transposed(hidden, text["embed"], dtype=jnp.float32)


def token_logprobs(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    temperature: float | jax.Array = 1.0,
    vision_features: VisionFeatures | None = None,
    remat: Remat = "none",
) -> TokenLogprobs:
    """Log-probability of every token given its past, under the distribution at `temperature`."""
    output = forward(params, config, batch, vision_features=vision_features, remat=remat)
    rows, length = batch.tokens.shape
    # The last column predicts nothing; it stays, so that the shape is a bucket's and not a bucket's less one.
    targets = jnp.roll(batch.tokens, -1, axis=1)
    logp, entropy = head_logprobs(
        output.hidden.reshape(rows * length, -1), head(params), targets.reshape(-1), temperature=temperature
    )
    same_segment = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] != 0)
    align = partial(_shift_right, keep=same_segment, shape=(rows, length))
    return TokenLogprobs(align(logp), align(entropy), output.router)


def _shift_right(values: jax.Array, keep: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Moves what position t - 1 predicted to t, 0 where t has no past in its segment."""
    kept = jnp.where(keep, values.reshape(shape)[:, :-1], jnp.float32(0))
    return jnp.pad(kept, ((0, 0), (1, 0)))


def _place(features: VisionFeatures, vision_index: jax.Array) -> jax.Array:
    """Tokens and DeepStack levels at their places in the rows, [1 + levels, B, T, H]; the caller masks text.

    All levels in one gather, for the gradient of a gather is a scatter, which runs one token at a time on a CPU.
    """
    levels = jnp.concatenate([features.tokens[None], features.deepstack])
    table = levels.swapaxes(0, 1).reshape(levels.shape[1], -1)
    placed = table[jnp.maximum(vision_index, 0)].reshape(*vision_index.shape, *levels.shape[::2])
    return jnp.moveaxis(placed, 2, 0)


def _add_deepstack(x: jax.Array, deepstack: jax.Array, layer: jax.Array, places: jax.Array) -> jax.Array:
    """Adds level `layer` of the DeepStack features [levels, B, T, H] in the first layers, nothing in the others."""

    def add(x: jax.Array) -> jax.Array:
        level = jax.lax.dynamic_index_in_dim(deepstack, layer, keepdims=False)
        return x + jnp.where(places, level, jnp.zeros((), x.dtype))

    return jax.lax.cond(layer < deepstack.shape[0], add, lambda x: x, x)
