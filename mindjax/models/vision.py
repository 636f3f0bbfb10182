"""The vision encoder: patches in, merged tokens out, with DeepStack taps on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mindjax.config import VisionConfig
from mindjax.models.norm import LayerNorm, layer_norm
from mindjax.models.parameters import Init
from mindjax.models.rope import vision_rope
from mindjax.ops.activation import bias_gelu
from mindjax.ops.attention import attention
from mindjax.ops.bits import split
from mindjax.ops.levels import put_level
from mindjax.ops.matmul import linear, matmul
from mindjax.ops.rotary import rotate
from mindjax.ops.scan import loops, scan_layers, unstack
from mindjax.types import VisionInputs
from sharding.links import ONE_DEVICE, Links
from sharding.remat import Remat, rematerialise

Lead = tuple[tuple[str, int], ...]
# A device encodes whole images, so it joins a block's weights along every axis that splits them.
WEIGHTS_OVER = ("fsdp", "tensor")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VisionFeatures:
    """What the language model reads.

    Attributes:
      tokens: [M, H], the merged tokens, M = R x L / merge**2, in the order of the packed rows.
      deepstack: [levels, M, H], added to the hidden states after the first `levels` text layers.
    """

    tokens: jax.Array
    deepstack: jax.Array


class Linear(nnx.Module):
    """A weight matrix with bias."""

    def __init__(self, init: Init, rows: tuple[str, int], columns: tuple[str, int], lead: Lead = ()):
        self.kernel = init.normal(*lead, rows, columns)
        self.bias = init.constant(0.0, *lead, columns)


class VisionAttention(nnx.Module):
    def __init__(self, init: Init, config: VisionConfig, lead: Lead):
        embed, heads = ("vision_embed", config.hidden_size), ("vision_heads", config.hidden_size)
        self.qkv = Linear(init, embed, ("vision_heads", 3 * config.hidden_size), lead)
        self.proj = Linear(init, heads, embed, lead)


class VisionMLP(nnx.Module):
    def __init__(self, init: Init, config: VisionConfig, lead: Lead):
        embed, hidden = ("vision_embed", config.hidden_size), ("vision_mlp", config.intermediate_size)
        self.fc1 = Linear(init, embed, hidden, lead)
        self.fc2 = Linear(init, hidden, embed, lead)


class VisionBlocks(nnx.Module):
    """All blocks, stacked on a leading layer axis."""

    def __init__(self, init: Init, config: VisionConfig):
        lead = (("vision_layer", config.depth),)
        self.norm1 = LayerNorm(init, config.hidden_size, lead)
        self.norm2 = LayerNorm(init, config.hidden_size, lead)
        self.attn = VisionAttention(init, config, lead)
        self.mlp = VisionMLP(init, config, lead)


class Merger(nnx.Module):
    """Joins neighbouring patches into one token of the language model's width."""

    def __init__(self, init: Init, config: VisionConfig, norm_size: int, lead: Lead = ()):
        merged = config.hidden_size * config.merge_unit
        self.norm = LayerNorm(init, norm_size, lead)
        self.fc1 = Linear(init, ("vision_merged", merged), ("vision_mlp", merged), lead)
        self.fc2 = Linear(init, ("vision_mlp", merged), ("embed", config.out_hidden_size), lead)


class VisionEncoder(nnx.Module):
    """The parameters of the whole encoder."""

    def __init__(self, init: Init, config: VisionConfig):
        self.patch_embed = Linear(init, ("patch", config.patch_dim), ("vision_embed", config.hidden_size))
        self.position_embed = init.normal(
            ("vision_position", config.num_position_embeddings), ("vision_embed", config.hidden_size)
        )
        self.blocks = VisionBlocks(init, config)
        self.merger = Merger(init, config, config.hidden_size)
        if levels := len(config.deepstack_visual_indexes):
            merged = config.hidden_size * config.merge_unit
            self.deepstack_mergers = Merger(init, config, merged, (("deepstack", levels),))


def encode(
    p: dict[str, Any],
    vision: VisionInputs,
    config: VisionConfig,
    remat: Remat,
    links: Links = ONE_DEVICE,
    axes: Any = None,
) -> VisionFeatures:
    """Encodes packed patches; attention stays inside one image or frame.

    Args:
      p: the `vision` branch of the parameters; its dtype is the compute dtype.
      vision: patches [R, L, P] and where they stand.
      remat: what a block keeps for the backward pass.
      links: to the devices that have the other parts of the parameters.
      axes: logical axes of the parameters; not read on one device.

    Returns:
      tokens [M, H] and DeepStack features [levels, M, H].
    """
    blocks, others = p["blocks"], {name: branch for name, branch in p.items() if name != "blocks"}
    p = links.weights(others, axes and {name: axes[name] for name in others}, WEIGHTS_OVER)
    x = embed_patches(p, vision, config)
    rope = vision_rope(vision.coordinates, config)

    gathers = links.layout.fsdp * links.layout.tensor > 1
    loop = loops(config.depth, remat != "none" or gathers)

    def block(carry: tuple[jax.Array, Any], layer: tuple[dict[str, Any], jax.Array]) -> tuple[Any, None]:
        x, taps = carry
        p, level = layer
        p = links.weights(p, axes and axes["blocks"], WEIGHTS_OVER)
        x = x + vision_attention(p, x, rope, vision.segment_ids, config)
        x = x + vision_mlp(p, x)
        # A tap is kept in the carry, not as a scan output, so that depth x patches is never materialised.
        return (x, put_level(taps, x, level) if loop else taps | {int(level): x}), None

    indexes = config.deepstack_visual_indexes
    levels = len(indexes)
    level_of = [indexes.index(layer) if layer in indexes else -1 for layer in range(config.depth)]
    layers = (blocks, np.asarray(level_of, np.int32))
    taps: Any = jnp.zeros((levels, *x.shape), x.dtype) if loop else {}
    (x, taps), _ = scan_layers(rematerialise(block, remat, gathers=gathers), (x, taps), layers, loop=loop)

    tokens = merge_patches(p["merger"], x, config)
    # Level j of the language model receives the j-th tap in layer order, through the merger of its place in the list.
    mergers = jax.tree.map(unstack, p.get("deepstack_mergers", {}))
    deepstack = [
        merge_tap(jax.tree.map(lambda parts, j=j: parts[j], mergers, is_leaf=lambda node: isinstance(node, list)),
                  taps[j], config)
        for j in map(int, np.argsort(indexes))
    ]  # fmt: skip
    return VisionFeatures(tokens, jnp.stack(deepstack) if levels else jnp.zeros((0, *tokens.shape), tokens.dtype))


def embed_patches(p: dict[str, Any], vision: VisionInputs, config: VisionConfig) -> jax.Array:
    """Patches [R, L, P] to the first block's input [R, L, D]."""
    x = _linear(p["patch_embed"], vision.patches.astype(p["patch_embed"]["kernel"].dtype))
    return x + _position_embedding(p["position_embed"], vision.coordinates, config)


def vision_attention(
    p: dict[str, Any], x: jax.Array, rope: tuple[jax.Array, jax.Array], segments: jax.Array, config: VisionConfig
) -> jax.Array:
    """What one block's attention, its norm included, adds to x [R, L, D]; `p` are the block's parameters."""
    rows, length = x.shape[:2]
    parts = split(_linear(p["attn"]["qkv"], layer_norm(p["norm1"], x)), 3)
    heads = (rows, length, config.num_heads, config.head_dim)
    q, k, v = (checkpoint_name(part.reshape(heads), "qkv") for part in parts)
    q, k = rotate(q, *rope), rotate(k, *rope)
    out = attention(q, k, v, q_segment_ids=segments, kv_segment_ids=segments, causal=False)
    return _linear(p["attn"]["proj"], out.reshape(rows, length, -1))


def vision_mlp(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """What one block's MLP, its norm included, adds to x [R, L, D]; `p` are the block's parameters."""
    hidden = checkpoint_name(matmul(layer_norm(p["norm2"], x), p["mlp"]["fc1"]["kernel"]), "mlp_hidden")
    return _linear(p["mlp"]["fc2"], bias_gelu(hidden, p["mlp"]["fc1"]["bias"]))


def merge_patches(p: dict[str, Any], x: jax.Array, config: VisionConfig) -> jax.Array:
    """The last block's output [R, L, D] as tokens [M, H]; normed, then joined."""
    return _merge(p, layer_norm(p["norm"], x).reshape(-1, config.hidden_size * config.merge_unit))


def merge_tap(p: dict[str, Any], x: jax.Array, config: VisionConfig) -> jax.Array:
    """A tapped block's output [R, L, D] as DeepStack features [M, H]; joined, then normed."""
    return _merge(p, layer_norm(p["norm"], x.reshape(-1, config.hidden_size * config.merge_unit)))


def _linear(p: dict[str, Any], x: jax.Array) -> jax.Array:
    return linear(x, p["kernel"], p["bias"])


def _merge(p: dict[str, Any], x: jax.Array) -> jax.Array:
    hidden = matmul(x, p["fc1"]["kernel"], dtype=jnp.float32)
    return _linear(p["fc2"], bias_gelu(hidden, p["fc1"]["bias"], approximate=False))


def _position_embedding(table: jax.Array, coordinates: jax.Array, config: VisionConfig) -> jax.Array:
    """Reads the square position table at the patch's place in its own grid, bilinearly, corners aligned."""
    side = round(config.num_position_embeddings**0.5)
    place, size = coordinates[..., :2].astype(jnp.float32), coordinates[..., 2:]
    source = place * (side - 1) / jnp.maximum(size - 1, 1).astype(jnp.float32)
    low = jnp.clip(jnp.floor(source), 0, side - 1)
    high = jnp.minimum(low + 1, side - 1)
    upper = source - jnp.floor(source)
    # As a matrix with four weights in each row: reading the table is a product, and so is its gradient, where four
    # gathers have a scatter that runs one row at a time on a CPU. In float32 as published: the weights do not fit bf16.
    places = jnp.arange(side, dtype=jnp.float32)[None, None, None]
    row, column = jnp.moveaxis(
        jnp.where(low[..., None] == places, 1 - upper[..., None], jnp.float32(0))
        + jnp.where(high[..., None] == places, upper[..., None], jnp.float32(0)),
        2,
        0,
    )  # [R, L, side] each
    weights = (row[..., :, None] * column[..., None, :]).reshape(*row.shape[:2], side * side)
    return matmul(weights, table.astype(jnp.float32)).astype(table.dtype)
