"""The model on many devices: what each of them holds, and its forward pass as one function of whole arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mindjax.config import ModelConfig
from mindjax.models.moe import RouterStats
from mindjax.models.vision import VisionFeatures
from mindjax.ops.quantize import Quantized
from mindjax.types import Batch, VisionInputs
from sharding.layout import BATCH, Layout
from sharding.parallel import Parallel
from sharding.rules import partition_spec
from sharding.sequence import zigzag

Array = jax.Array
Params = dict[str, Any]
_ROWS = partition_spec(("batch", "time"))
# Devices that share a batch shard, and hence its pictures.
_VISION_SHARE = ("stage", "sequence", "tensor")


def parameter_axes(axes: Params, config: ModelConfig, parallel: Parallel) -> Params:
    """The logical axes of the parameters in this layout, from those of `qwen3_vl.logical_axes`."""
    text = config.text
    return parallel.logical_axes(axes, layers=text.num_hidden_layers, kv_heads=text.num_key_value_heads)


def check_model(config: ModelConfig, layout: Layout) -> None:
    """Refuses a layout that this model cannot be cut into.

    Raises:
      ValueError: naming every size that does not divide, and what to change.
    """
    text, vision, tensor = config.text, config.vision, layout.tensor
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    parts = layout.stage * layout.pipeline_rounds
    # Every device has at least one key/value head.
    local, local_kv = max(1, heads // tensor), max(1, kv_heads // tensor)
    ulysses = int(np.lcm(local_kv, layout.sequence))
    merged = vision.hidden_size * vision.merge_unit
    experts = [text.moe_intermediate_size] if text.num_experts else [text.intermediate_size]
    uneven = text.num_hidden_layers % layout.stage or layout.pipeline_rounds > 1
    stacked = layout.fsdp * (layout.stage if uneven else 1)
    checks = [
        (heads % tensor == 0, f"{heads} attention heads cannot be split over tensor={tensor}; use a divisor"),
        (kv_heads % tensor == 0 or tensor % kv_heads == 0,
         f"tensor={tensor} neither divides {kv_heads} key/value heads nor is a multiple of them"),
        (all(size % tensor == 0 for size in experts),
         f"the hidden units of an MLP, {experts[0]}, cannot be split over tensor={tensor}"),
        (text.vocab_size % tensor == 0, f"the vocabulary of {text.vocab_size} cannot be split over tensor={tensor}"),
        ((vision.hidden_size % tensor, vision.intermediate_size % tensor, merged % tensor) == (0, 0, 0),
         f"the vision encoder's widths {vision.hidden_size}, {vision.intermediate_size} and {merged} cannot be split "
         f"over tensor={tensor}"),
        (text.hidden_size % stacked == 0, f"the width {text.hidden_size} cannot be split over fsdp x stage = {stacked}"
         if stacked > layout.fsdp else f"the width {text.hidden_size} cannot be split over fsdp={layout.fsdp}"),
        (vision.hidden_size % layout.fsdp == 0,
         f"the vision encoder's width {vision.hidden_size} cannot be split over fsdp={layout.fsdp}"),
        (layout.expert == 1 or text.num_experts > 0,
         f"expert={layout.expert} splits experts, and this model has none; give the devices to data or fsdp"),
        (text.num_experts % layout.expert == 0,
         f"{text.num_experts} experts cannot be split over expert={layout.expert}; use a divisor"),
        (parts <= text.num_hidden_layers,
         f"{text.num_hidden_layers} layers are too few for stage x pipeline_rounds = {parts}"),
        (layout.sequence == 1 or layout.context == "ring" or local % ulysses == 0,
         f"with context='ulysses', {local} heads of a device cannot be traded over sequence={layout.sequence}; use "
         f"context='ring', or a sequence that divides {local}"),
    ]  # fmt: skip
    problems = [message for ok, message in checks if not ok]
    if problems:
        raise ValueError(f"layout {layout}: " + "; ".join(problems))


def check_batch(layout: Layout, rows: int, length: int) -> None:
    """Refuses a batch that this layout cannot cut.

    Args:
      rows: of a micro-batch, over all devices.
      length: tokens in a row.

    Raises:
      ValueError: naming what does not divide, and what to change.
    """
    shards, parts = layout.batch_shards, layout.microbatches
    cut = layout.sequence * layout.tensor * layout.stage
    if layout.context == "ring" and layout.sequence > 1:
        cut = int(np.lcm(cut, 2 * layout.sequence))
    checks = [
        (rows % shards == 0, f"{rows} rows cannot be split over data x fsdp x expert = {shards}"),
        (rows % shards or rows // shards % parts == 0,
         f"the {rows // shards} rows of a device cannot be cut into {parts} microbatches for the pipeline; give a "
         f"multiple of {parts} rows to a device, or set pipeline_microbatches"),
        (length % cut == 0, f"rows of {length} tokens cannot be cut into {cut} parts (sequence x tensor x stage); use "
         f"a multiple of {cut}"),
    ]  # fmt: skip
    problems = [message for ok, message in checks if not ok]
    if problems:
        raise ValueError(f"layout {layout}: " + "; ".join(problems))


def spread(
    predict: Callable[..., Any],
    params: Params,
    axes: Params,
    config: ModelConfig,
    batch: Batch,
    targets: Array,
    temperature: Array,
    vision_features: VisionFeatures | None,
    parallel: Parallel,
) -> tuple[Array, Array, RouterStats | None]:
    """`predict` on every device with its parts, and what they find joined.

    Args:
      predict: (params, batch, targets, temperature, vision features, links=, axes=) -> (logp, entropy, router).
      params, axes: whole arrays, and their logical axes in a tree of the same form.
      batch: rows of all devices: shard after shard, pictures in the rows of their shard.
      targets: [B, T].
      vision_features: of the pictures in the batch, shard after shard, where they have been encoded before.

    Returns:
      logp and entropy [B, T], router statistics of all layers.
    """
    layout, rows, length = parallel.layout, *batch.tokens.shape
    check_model(config, layout)
    check_batch(layout, rows, length)
    axes = parameter_axes(axes, config, parallel)
    params, specs = cut_params(params, axes, config, parallel)
    tokens_of_shard = 0
    if batch.vision is not None and vision_features is None:
        vision = batch.vision
        tokens_of_shard = vision.segment_ids.size // config.vision.merge_unit // layout.batch_shards
        batch = replace(batch, vision=_even_rows(vision, layout))
    else:
        batch = replace(batch, vision=None)
        if vision_features is not None:
            tokens_of_shard = vision_features.tokens.shape[0] // layout.batch_shards
    ring = layout.sequence > 1 and layout.context == "ring"
    order = zigzag(length, layout.sequence) if ring else None
    if order is not None:
        reorder = {name: getattr(batch, name)[:, order] for name in _TOKEN_FIELDS}
        batch, targets = replace(batch, **reorder), targets[:, order]

    def local(
        params: Params, batch: Batch, targets: Array, temperature: Array, vision_features: VisionFeatures | None
    ) -> Any:
        links = parallel.links
        # As counted in this shard; places of text stay below 0.
        shard = jax.lax.axis_index(BATCH)
        batch = replace(batch, vision_index=batch.vision_index - shard * tokens_of_shard)
        logp, entropy, router = predict(
            whole_gate_up(params, layout), batch, targets, temperature, vision_features, links=links, axes=axes
        )
        if layout.stage > 1:
            router = jax.tree.map(lambda leaf: leaf[None], router)
        return logp, entropy, router

    stats = PartitionSpec("stage") if layout.stage > 1 else PartitionSpec()
    features = VisionFeatures(PartitionSpec(BATCH), PartitionSpec(None, BATCH))  # type: ignore[arg-type]
    run = parallel.spmd(
        local,
        in_specs=(specs, _batch_specs(batch), _ROWS, PartitionSpec(), features if vision_features else PartitionSpec()),
        out_specs=(_ROWS, _ROWS, stats),
    )
    logp, entropy, router = run(params, batch, targets, temperature, vision_features)
    if order is not None:
        logp, entropy = (x[:, np.argsort(order)] for x in (logp, entropy))
    if layout.stage > 1:
        router = jax.tree.map(lambda leaf: parallel.from_stages(leaf, config.text.num_hidden_layers), router)
    return logp, entropy, router


_TOKEN_FIELDS = ("tokens", "positions", "segment_ids", "loss_mask", "vision_index")


def _batch_specs(batch: Batch) -> Batch:
    fields: dict[str, Any] = dict.fromkeys(_TOKEN_FIELDS, _ROWS)
    if batch.vision is not None:
        fields["vision"] = jax.tree.map(lambda _: partition_spec(("vision_batch",)), batch.vision)
    return replace(batch, **fields)


def _even_rows(vision: VisionInputs, layout: Layout) -> VisionInputs:
    """With empty rows behind those of each shard, so that the devices of a shard get equally many."""
    shards = layout.batch_shards
    share = int(np.prod([layout.sizes[axis] for axis in _VISION_SHARE]))

    def pad(leaf: Array) -> Array:
        leaf = leaf.reshape(shards, -1, *leaf.shape[1:])
        padding = [(0, 0)] * leaf.ndim
        padding[1] = (0, -leaf.shape[1] % share)
        return jnp.pad(leaf, padding).reshape(-1, *leaf.shape[2:])

    return jax.tree.map(pad, vision)


def cut_params(params: Params, axes: Params, config: ModelConfig, parallel: Parallel) -> tuple[Params, Params]:
    """The parameters as the devices take them, and their specs."""
    specs = jax.tree.map(partition_spec, axes, is_leaf=lambda node: isinstance(node, tuple))
    text, text_specs = dict(params["text"]), dict(specs["text"])
    # 8-bit matrices lie the other way round, and are split by layer and expert alone.
    text_specs["layers"] = jax.tree.map(
        lambda leaf, spec: PartitionSpec(*spec[:-2]) if isinstance(leaf, Quantized) else spec,
        text["layers"], text_specs["layers"], is_leaf=lambda node: isinstance(node, Quantized),
    )  # fmt: skip
    if parallel.layout.stage > 1:
        text["layers"], text_specs["layers"] = parallel.by_stage(text["layers"], axes["text"]["layers"])
    if config.text.num_experts and parallel.layout.tensor > 1:
        # Gate and up lie side by side; a device needs its units of both.
        layers, layer_specs = dict(text["layers"]), dict(text_specs["layers"])
        moe, moe_specs = dict(layers["moe"]), dict(layer_specs["moe"])
        leaf, spec = moe["gate_up"], moe_specs["gate_up"]
        moe["gate_up"] = leaf.reshape(*leaf.shape[:-1], 2, -1)
        moe_specs["gate_up"] = PartitionSpec(*spec[:-1], None, spec[-1])
        layers["moe"], layer_specs["moe"] = moe, moe_specs
        text["layers"], text_specs["layers"] = layers, layer_specs
    return {**params, "text": text}, {**specs, "text": text_specs}


def whole_gate_up(params: Params, layout: Layout) -> Params:
    """With gate and up of each device side by side again."""
    layers = params["text"]["layers"]
    if "moe" not in layers or layout.tensor == 1:
        return params
    leaf = layers["moe"]["gate_up"]
    moe = {**layers["moe"], "gate_up": leaf.reshape(*leaf.shape[:-2], -1)}
    return {**params, "text": {**params["text"], "layers": {**layers, "moe": moe}}}
