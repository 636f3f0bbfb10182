"""Our model one operation at a time, in a plain loop over the functions that its scan is made of.

Each operation takes what the one before it gave, or, where the caller says so, another implementation's values: then
what comes out is the error of that operation alone. Values pass in and out flat: [N, H] over the real tokens of a
batch, row by row, and [P, D] over its patches in the order in which the rows show them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.config import ModelConfig, TextConfig
from mindjax.models import qwen3_vl
from mindjax.models.attention import text_attention
from mindjax.models.mlp import mlp
from mindjax.models.moe import moe
from mindjax.models.rope import text_rope, vision_rope
from mindjax.models.vision import embed_patches, merge_patches, merge_tap, vision_attention, vision_mlp
from mindjax.ops.attention import attention
from mindjax.ops.matmul import matmul
from mindjax.ops.norm import rms_norm
from mindjax.types import Batch

Params = dict[str, Any]
Rounding = Callable[[jax.Array], jax.Array]


@dataclass
class Trace:
    """What every operation of one forward pass read and gave.

    Names are "vision.embed", "vision.0.attention", "vision.0.mlp", "vision.0.hidden", ..., "vision.deepstack.0",
    "vision.merger", "text.embed", "text.0.attention", "text.0.mlp", "text.0.hidden", ..., "head", in the order in which
    they run. What a block adds to the stream is its output; "hidden" is the stream itself after a layer.

    Attributes:
      inputs: of the operations that read the stream, [N, H] or [P, D], in the dtype of the computation.
      outputs: of all of them, float32 or float64.
      choices: text layer -> [N, k], the experts of each token, most probable first.
    """

    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    choices: dict[int, np.ndarray] = field(default_factory=dict)


class Places:
    """Where the real tokens and patches of a batch lie."""

    def __init__(self, batch: Batch, config: ModelConfig):
        index, unit = np.asarray(batch.vision_index), config.vision.merge_unit
        self.real = np.asarray(batch.segment_ids) > 0
        self.merged = index[index >= 0]
        self.patches = (self.merged[:, None] * unit + np.arange(unit)).reshape(-1)
        self.rows = None if batch.vision is None else batch.vision.patches.shape[:2]

    def text(self, flat: np.ndarray, dtype: Any) -> jax.Array:
        rows = np.zeros((*self.real.shape, flat.shape[-1]), np.float32)
        rows[self.real] = flat
        return jnp.asarray(rows, dtype)

    def patch(self, flat: np.ndarray, dtype: Any) -> jax.Array:
        assert self.rows is not None
        rows = np.zeros((self.rows[0] * self.rows[1], flat.shape[-1]), np.float32)
        rows[self.patches] = flat
        return jnp.asarray(rows.reshape(*self.rows, -1), dtype)

    def flat_text(self, rows: jax.Array) -> np.ndarray:
        return np.asarray(rows, np.float32)[self.real]

    def flat_patch(self, rows: jax.Array) -> np.ndarray:
        return np.asarray(rows, np.float32).reshape(-1, rows.shape[-1])[self.patches]

    def flat_merged(self, tokens: jax.Array) -> np.ndarray:
        return np.asarray(tokens, np.float32)[self.merged]


def trace(
    params: Params, config: ModelConfig, batch: Batch, given: Trace | None = None, *, kv: Rounding | None = None
) -> Trace:
    """Runs the model operation by operation.

    Args:
      params: their dtype is that of the computation.
      batch: rows of conversations.
      given: another trace of the same batch; each operation then reads that one's inputs instead of ours.
      kv: what a cache makes of the language model's keys and values.
    """
    places, out = Places(batch, config), Trace()
    source = _Source(given, params["text"]["embed"].dtype)
    deepstack: list[Any] = []
    tokens: Any = None
    if batch.vision is not None:
        tokens, deepstack = _trace_vision(params["vision"], config, batch, places, out, source)
        if given is not None:  # what the language model is fed is the other's too
            tokens = jnp.asarray(given.outputs["vision.merger"], tokens.dtype)
            deepstack = [
                jnp.asarray(given.outputs[f"vision.deepstack.{j}"], tokens.dtype) for j in range(len(deepstack))
            ]
    _trace_text(params, config, batch, places, out, source, tokens, deepstack, kv)
    return out


@dataclass(frozen=True)
class _Source:
    """Where the next operation's values come from: what this trace computed, or another one's."""

    given: Trace | None
    dtype: Any

    def input(self, name: str, own: jax.Array, place: Any) -> jax.Array:
        return own if self.given is None else place(self.given.inputs[name], self.dtype)

    def output(self, name: str, own: jax.Array, place: Any) -> jax.Array:
        """Of an operation whose result is added to the stream, so that the sum is judged by itself too."""
        return own if self.given is None else place(self.given.outputs[name], self.dtype)


def _trace_vision(
    p: Params, config: ModelConfig, batch: Batch, places: Places, out: Trace, source: _Source
) -> tuple[jax.Array, list[jax.Array]]:
    """Returns the merged tokens [M, H] and the DeepStack levels, in the order in which the rows show them."""
    vision, flat = config.vision, places.flat_patch
    assert batch.vision is not None
    x = _embed_patches(p, batch.vision, vision)
    out.outputs["vision.embed"] = flat(x)
    rope, segments = vision_rope(batch.vision.coordinates, vision), batch.vision.segment_ids
    levels: dict[int, jax.Array] = {}
    for i in range(vision.depth):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
        for name in (f"vision.{i}.attention", f"vision.{i}.mlp"):
            x = source.input(name, x, places.patch)
            out.inputs[name] = flat(x)
            attends = name.endswith("attention")
            added = _vision_attention(block, x, rope, segments, vision) if attends else _vision_mlp(block, x)
            out.outputs[name] = flat(added)
            x = x + source.output(name, added, places.patch)
        out.outputs[f"vision.{i}.hidden"] = flat(x)
        if i in vision.deepstack_visual_indexes:
            # Numbered as the language model adds them; the merger is that of the layer's place in the list.
            level, place = sorted(vision.deepstack_visual_indexes).index(i), vision.deepstack_visual_indexes.index(i)
            name = f"vision.deepstack.{level}"
            tap = source.input(name, x, places.patch)
            out.inputs[name] = flat(tap)
            merger = jax.tree.map(lambda leaf, place=place: leaf[place], p["deepstack_mergers"])
            merged = _merge_tap(merger, tap, vision)
            out.outputs[name], levels[level] = places.flat_merged(merged), merged[places.merged]
    x = source.input("vision.merger", x, places.patch)
    out.inputs["vision.merger"] = flat(x)
    merged = _merge_patches(p["merger"], x, vision)
    out.outputs["vision.merger"] = places.flat_merged(merged)
    return merged[places.merged], [levels[level] for level in sorted(levels)]


def _trace_text(
    params: Params, config: ModelConfig, batch: Batch, places: Places, out: Trace, source: _Source,
    tokens: jax.Array | None, deepstack: list[jax.Array], kv: Rounding | None,
) -> None:  # fmt: skip
    text, flat = config.text, places.flat_text
    shown = np.nonzero(np.asarray(batch.vision_index) >= 0)
    x = params["text"]["embed"][batch.tokens]
    if tokens is not None:
        x = x.at[shown].set(tokens)
    out.outputs["text.embed"] = flat(x)
    rope, segments = text_rope(jnp.asarray(batch.positions), text), jnp.asarray(batch.segment_ids)

    for i in range(text.num_hidden_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["text"]["layers"])
        name = f"text.{i}.attention"
        x = source.input(name, x, places.text)
        out.inputs[name] = flat(x)
        added = _attention_block(layer, x, rope, segments, text, kv)
        out.outputs[name] = flat(added)
        x = x + source.output(name, added, places.text)
        name = f"text.{i}.mlp"
        x = source.input(name, x, places.text)
        out.inputs[name] = flat(x)
        added, choices = _mlp_block(layer, x, segments, text)
        out.outputs[name] = flat(added)
        if choices is not None:
            out.choices[i] = np.asarray(choices)[places.real]
        x = x + source.output(name, added, places.text)
        if i < len(deepstack):
            x = x.at[shown].add(deepstack[i])
        out.outputs[f"text.{i}.hidden"] = flat(x)
    x = source.input("head", x, places.text)
    out.inputs["head"] = flat(x)
    out.outputs["head"] = flat(_head(params, x, text))


def logits(params: Params, config: ModelConfig, batch: Batch) -> np.ndarray:
    """[N, V] of the model itself, as training runs it."""
    return np.asarray(_logits(params, batch, config))[np.asarray(batch.segment_ids) > 0]


# ---- compiled once, whatever feeds them

_embed_patches = jax.jit(embed_patches, static_argnums=2)
_vision_attention = jax.jit(vision_attention, static_argnums=4)
_vision_mlp = jax.jit(vision_mlp)
_merge_patches, _merge_tap = jax.jit(merge_patches, static_argnums=2), jax.jit(merge_tap, static_argnums=2)


@partial(jax.jit, static_argnums=(4, 5))
def _attention_block(
    p: Params, x: jax.Array, rope: Any, segments: jax.Array, text: TextConfig, kv: Rounding | None
) -> jax.Array:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        if kv is not None:
            k, v = kv(k), kv(v)
        return attention(q, k, v, q_segment_ids=segments, kv_segment_ids=segments, causal=True), None

    return text_attention(p["attn"], rms_norm(x, p["input_norm"], text.rms_norm_eps), rope, text, attend)[0]


@partial(jax.jit, static_argnums=3)
def _mlp_block(p: Params, x: jax.Array, segments: jax.Array, text: TextConfig) -> tuple[jax.Array, jax.Array | None]:
    normed = rms_norm(x, p["post_attention_norm"], text.rms_norm_eps)
    if not text.num_experts:
        return mlp(p["mlp"], normed), None
    # The softmax keeps the order of the router's logits.
    scores = matmul(normed, p["moe"]["router"], dtype=jnp.float32)
    return moe(p["moe"], normed, segments, text)[0], jax.lax.top_k(scores, text.num_experts_per_tok)[1]


@partial(jax.jit, static_argnums=2)
def _head(params: Params, x: jax.Array, text: TextConfig) -> jax.Array:
    return qwen3_vl.logits(params, rms_norm(x, params["text"]["norm"], text.rms_norm_eps))


@partial(jax.jit, static_argnums=2)
def _logits(params: Params, batch: Batch, config: ModelConfig) -> jax.Array:
    return qwen3_vl.logits(params, qwen3_vl.forward(params, config, batch).hidden)
