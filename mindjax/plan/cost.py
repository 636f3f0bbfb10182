"""The analytic cost model: what a training step costs one device, from shapes alone, in milliseconds.

It ranks layouts and predicts where no compiler is at hand. Every formula follows what the model does
(`mindjax.models`, `sharding.links`); `mindjax plan` shows it beside what the compiled program says.

n tokens of a micro-batch that a device works on, T tokens of a row, L layers, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

from mindjax.config import ModelConfig
from mindjax.models.spread import check_batch, check_model
from mindjax.ops.attention import QUERY_BLOCK
from mindjax.ops.logprobs import CHUNK_LOGITS, LEAST_PLACES
from sharding.layout import Layout
from sharding.pipeline import bubble_share
from sharding.remat import Remat

BF16, F32 = 2, 4
# Tiles of splash attention, and the head sizes that it pads to.
TILE, LANES = 512, 128
# Bytes of a trainable parameter: float32 master, two moments, gradient, and the copy that is computed with.
STATE = {"parameters": F32, "optimizer": 2 * F32, "gradients": F32, "computed copies": BF16}


@dataclass(frozen=True)
class Job:
    """A training step.

    Attributes:
      model: shapes.
      layout: see `sharding.layout`.
      batch: rows of an update, over all devices.
      length: tokens of a row, T.
      images: in a row.
      image_tokens: of one image; four patches make a token.
      micro_batches: accumulated into one update.
      remat: what a block keeps for its backward pass.
    """

    model: ModelConfig
    layout: Layout
    batch: int
    length: int
    images: int = 0
    image_tokens: int = 1024
    micro_batches: int = 1
    remat: Remat = "full"

    @property
    def rows(self) -> int:
        """Rows of a micro-batch on one device."""
        return self.batch // (self.layout.batch_shards * self.micro_batches)

    @property
    def tokens(self) -> int:
        """Of an update, over all devices."""
        return self.batch * self.length

    @property
    def patches(self) -> int:
        """Of an update, over all devices."""
        return self.batch * self.images * self.image_tokens * self.model.vision.merge_unit


@dataclass
class Cost:
    """Of one step, on the busiest device.

    Attributes:
      flops: part -> FLOPs that are done, recompute and the bubble included.
      useful: FLOPs that the mathematics asks for, on average over devices: no recompute, half of the scores.
      hbm: part -> bytes to and from main memory.
      sent: mesh axis -> bytes that leave a device.
      memory: kind -> bytes.
    """

    flops: Counter[str] = field(default_factory=Counter)
    useful: float = 0.0
    hbm: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    memory: Counter[str] = field(default_factory=Counter)


def check(job: Job) -> None:
    """Raises ValueError where the model or the batch does not divide by the layout, with what to change."""
    layout = job.layout
    shards = layout.batch_shards * job.micro_batches
    check_model(job.model, layout)
    if job.batch % shards:
        near = max(1, round(job.batch / shards)) * shards
        raise ValueError(
            f"layout {layout}: {job.batch} rows cannot be split over data x fsdp x expert = {layout.batch_shards} "
            f"times {job.micro_batches} micro-batches; use --batch {near}, or smaller axes"
        )
    check_batch(layout, job.batch // job.micro_batches, job.length)


@lru_cache(maxsize=64)
def parameters(model: ModelConfig) -> dict[str, float]:
    """How many, by part; `experts`, `attention`, `mlp` and `router` of all layers together."""
    text, vision = model.text, model.vision
    hidden, layers = text.hidden_size, text.num_hidden_layers
    heads, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    width, merged = vision.hidden_size, vision.hidden_size * vision.merge_unit
    block = 4 * width**2 + 2 * width * vision.intermediate_size + 9 * width + vision.intermediate_size
    mergers = 1 + len(vision.deepstack_visual_indexes)
    return {
        "attention": layers * hidden * (2 * heads + 2 * kv),
        "mlp": 0 if text.num_experts else layers * 3 * hidden * text.intermediate_size,
        "experts": layers * text.num_experts * 3 * hidden * text.moe_intermediate_size,
        "router": layers * hidden * text.num_experts,
        "embedding": text.vocab_size * hidden * (1 if model.tie_word_embeddings else 2),
        "norms": layers * (2 * hidden + 2 * text.head_dim) + hidden,
        "vision": vision.depth * block + mergers * (merged**2 + merged * (vision.out_hidden_size + 1))
        + width * (vision.patch_dim + vision.num_position_embeddings),
    }  # fmt: skip


def estimate(job: Job, *, fused: bool = True) -> Cost:
    """The costs of a step.

    Args:
      job: the step.
      fused: whether attention over whole rows runs as one kernel that keeps scores on the chip and leaves out what a
        causal mask empties, as on TPU; else all scores are made and cross main memory.

    Raises:
      ValueError: see `check`.
    """
    check(job)
    cost = Cost()
    _layers(job, cost, fused and not (job.layout.sequence > 1 and job.layout.context == "ring"))
    _head(job, cost)
    _vision(job, cost, fused)
    _state(job, cost)
    cost.useful = useful_flops(job) / job.layout.devices
    return cost


def useful_flops(job: Job) -> float:
    """FLOPs of forward and backward pass over all devices: two and four for each weight and token, causal scores."""
    text, vision = job.model.text, job.model.vision
    count = parameters(job.model)
    active = count["attention"] + count["mlp"] + count["router"] + text.vocab_size * text.hidden_size
    if text.num_experts:
        active += count["experts"] * text.num_experts_per_tok / text.num_experts
    scores = 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * job.length
    total = 3.0 * job.tokens * (2 * active + scores)
    if job.images:
        scores = 4 * vision.depth * vision.hidden_size * job.image_tokens * vision.merge_unit
        total += 3.0 * job.patches * (2 * _vision_weights(job) + scores)
    return total


def _vision_weights(job: Job) -> float:
    """Multiplications of one patch."""
    vision = job.model.vision
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    merged = vision.hidden_size * vision.merge_unit
    merger = (merged**2 + merged * vision.out_hidden_size) / vision.merge_unit
    levels = 1 + len(vision.deepstack_visual_indexes)
    return vision.depth * block + levels * merger + vision.hidden_size * vision.patch_dim


def _keeps(remat: Remat, name: str) -> bool:
    return remat == "none" or (not isinstance(remat, str) and name in remat)


def _layers(job: Job, cost: Cost, fused: bool) -> None:
    text, layout, remat = job.model.text, job.layout, job.remat
    hidden, tensor, sequence = text.hidden_size, layout.tensor, layout.sequence
    n = job.rows * job.length / sequence  # tokens between the matrices' gathers
    # A stage works on garbage in the bubble too, and gathers its weights in every tick.
    ticks = layout.pipeline_rounds * layout.microbatches + layout.stage - 1 if layout.stage > 1 else 1
    share = math.ceil(text.num_hidden_layers / (layout.stage * layout.pipeline_rounds)) * layout.pipeline_rounds
    bubble = 1 / (1 - bubble_share(layout.stage, layout.microbatches, layout.pipeline_rounds))
    passes = job.micro_batches * share * bubble  # layers' worth of all n tokens
    loads = job.micro_batches * share * (ticks / layout.pipeline_rounds)  # layers' worth of weights used
    again = remat != "none"

    # Products, as FLOPs of one token and layer on one device.
    width = text.num_attention_heads * text.head_dim / tensor
    kv = max(text.num_key_value_heads / tensor, 1) * text.head_dim
    qkv, out = 2 * hidden * (width + 2 * kv), 2 * hidden * width
    scores = 4 * width * job.length
    if sequence > 1 and layout.context == "ring":
        scores *= (2 * sequence + 1) / (4 * sequence)
    if fused:
        tiles = max(1, job.length // TILE)
        scores *= (tiles + 1) / (2 * tiles)
    if text.num_experts:
        inner = text.num_experts_per_tok * text.moe_intermediate_size / tensor
        router = 2 * hidden * text.num_experts / tensor
    else:
        inner, router = text.intermediate_size / tensor, 0.0
    up, down = 4 * hidden * inner, 2 * hidden * inner
    parts = {
        "attention products": (qkv + out, (0 if _keeps(remat, "qkv") else qkv) + out),
        "attention scores": (scores, 0 if _keeps(remat, "attention") else scores),
        "experts" if text.num_experts else "mlp": (up + down, 0 if _keeps(remat, "mlp_hidden") else up),
        "router": (router, router),
    }
    for name, (forward, recomputed) in parts.items():
        backward = (3.5 if fused else 2.5) if name == "attention scores" else 2.0
        cost.flops[name] += int(n * passes * ((1 + backward) * forward + (recomputed if again else 0)))

    # Weights of a layer as a device uses them, gathered over fsdp.
    weights = hidden * (2 * width + 2 * kv) * BF16
    if text.num_experts:
        weights += 3 * hidden * text.moe_intermediate_size * text.num_experts / (tensor * layout.expert) * BF16
    else:
        weights += 3 * hidden * inner * BF16
    uses = 3 if again else 2
    cost.sent["fsdp"] += int(weights * loads * _ring(layout.fsdp) * (2 + 1))  # gathered twice, gradient scattered
    cost.hbm["weights"] += int(weights * loads * (uses + 1) * 2)

    # Tokens between the matrices.
    tokens = n * hidden * BF16
    exchanges = 8 + (3 if again else 0)
    cost.sent["tensor"] += int(tokens * passes * _ring(tensor) * exchanges)
    if sequence > 1:
        wide, narrow = n * width * BF16, n * kv * BF16
        if layout.context == "ulysses":
            narrow *= max(1.0, sequence / max(text.num_key_value_heads / tensor, 1))
            rounds = 2 + (0 if not again or _keeps(remat, "attention") else 1)
            cost.sent["sequence"] += int((2 * wide + 2 * narrow) * passes * _ring(sequence) * rounds)
        else:
            rounds = 1 + (0 if not again or _keeps(remat, "attention") else 1)
            forward, backward = 2 * narrow * rounds, 2 * narrow + 4 * narrow
            cost.sent["sequence"] += int((forward + backward) * (sequence - 1) * passes)
    if layout.expert > 1:
        # A copy of every token to each of its experts and back, three times where the block is recomputed.
        copies = text.num_experts_per_tok * tokens / tensor
        cost.sent["expert"] += int(copies * 2 * passes * _ring(layout.expert) * (3 if again else 2))
    if layout.stage > 1:
        moved = job.rows / layout.microbatches * job.length / (sequence * tensor) * hidden * BF16
        cost.sent["stage"] += int(moved * ticks * 2 * job.micro_batches)

    # Activations that cross main memory: operands and results of products and norms, forward, backward, recomputed.
    activations = 10 * hidden / tensor + 4 * hidden + 4 * width + 4 * kv + 6 * inner
    if text.num_experts:
        activations += 6 * text.num_experts_per_tok * hidden / tensor
    cost.hbm["activations"] += int(n * passes * BF16 * activations * (4 if again else 3))
    if not fused:
        # Scores are float32 and go through main memory: the product, the maximum, the exponentials, the second product.
        times = 5 + 7 + (5 if again and not _keeps(remat, "attention") else 0)
        cost.hbm["attention scores"] += int(scores / (4 * text.head_dim) * n * passes * F32 * times)

    # What stays for the backward pass.
    live = job.rows * job.length / sequence * (ticks / layout.microbatches if layout.stage > 1 else 1)
    names = {
        "qkv": (width + 2 * kv) * BF16,
        "attention": width * BF16 + F32 * text.num_attention_heads / tensor,
        "mlp_hidden": 2 * inner * BF16,
    }
    kept = hidden / tensor * BF16 + sum(size for name, size in names.items() if _keeps(remat, name))
    if remat == "none":
        # Norms and sums in float32 too, and of experts the rows that were sent and that came back.
        kept += (2 * hidden + 2 * width + 2 * inner) * BF16 + 3 * hidden / tensor * (BF16 + F32)
        kept += 2 * text.num_experts_per_tok * hidden / tensor * BF16
    cost.memory["saved activations"] += int(live * share * kept)

    # The largest moment: one layer's backward pass.
    block = min(job.length, QUERY_BLOCK)
    small = layout.microbatches if layout.stage > 1 else 1
    heads = text.num_attention_heads / tensor / (sequence if layout.context == "ulysses" else 1)
    square = job.rows / small * heads * block * job.length * (F32 * 2 + BF16)
    if layout.context == "ring" and sequence > 1:
        square /= 2 * sequence
    working = n / small * BF16 * (6 * hidden + 3 * width + 3 * kv + 5 * inner)
    if text.num_experts:
        working += n / small * BF16 * 3 * text.num_experts_per_tok * hidden / tensor
    square *= 0.0 if fused else 1.0
    cost.memory["temporaries"] += int(square + working + (2 * weights if layout.fsdp > 1 else 0) + weights)


def _head(job: Job, cost: Cost) -> None:
    """The last product and its softmax, in chunks, logits recomputed."""
    text, layout = job.model.text, job.layout
    n = job.rows * job.length / layout.sequence
    vocabulary = text.vocab_size / layout.tensor
    product = 2.0 * text.hidden_size * vocabulary * n
    chunk = max(CHUNK_LOGITS, LEAST_PLACES * vocabulary)
    chunked = n * vocabulary > chunk
    cost.flops["head"] += int(product * (4 if chunked else 3) * job.micro_batches)
    cost.hbm["logits"] += int(n * vocabulary * F32 * 8 * job.micro_batches)
    # Each chunk reads the matrix three times, and adds to its gradient in float32.
    matrix = text.hidden_size * vocabulary * (3 * BF16 + 2 * F32)
    cost.hbm["logits"] += int(matrix * math.ceil(n * vocabulary / chunk) * job.micro_batches)
    cost.memory["logits"] += int(3 * F32 * min(chunk, n * vocabulary))
    tables = text.vocab_size * text.hidden_size / layout.tensor * BF16 * (1 if job.model.tie_word_embeddings else 2)
    cost.sent["fsdp"] += int(tables * _ring(layout.fsdp) * 2 * job.micro_batches)
    cost.sent["tensor"] += int(n * text.hidden_size * BF16 * _ring(layout.tensor) * 2 * job.micro_batches)
    cost.memory["temporaries"] += int(tables if layout.fsdp > 1 else 0)


def _vision(job: Job, cost: Cost, fused: bool) -> None:
    """The vision tower, its rows spread over all devices."""
    if not job.images:
        return
    vision = job.model.vision
    n = job.patches / job.layout.devices / job.micro_batches
    scores = 4.0 * vision.depth * vision.hidden_size * job.image_tokens * vision.merge_unit
    again = job.remat != "none"
    products = 2 * _vision_weights(job)
    passes = n * job.micro_batches
    cost.flops["vision"] += int(passes * (4 if again else 3) * products)
    if fused:
        scores *= -(-vision.head_dim // LANES) * LANES / vision.head_dim
    else:
        cost.hbm["vision scores"] += int(passes * (17 if again else 12) * scores / (4 * vision.head_dim) * F32)
    cost.flops["vision scores"] += int(
        passes * ((5.5 if again else 4.5) if fused else (4.5 if again else 3.5)) * scores
    )
    weights = parameters(job.model)["vision"] * BF16
    cost.sent["fsdp"] += int(weights * _ring(job.layout.fsdp) * 3 * job.micro_batches)
    per_patch = 18 * vision.hidden_size + 4 * vision.intermediate_size
    cost.hbm["vision"] += int(passes * (4 if again else 3) * vision.depth * per_patch * BF16)
    kept = vision.hidden_size * (1 if again else 12) * BF16
    cost.memory["saved activations"] += int(n * vision.depth * kept)
    cost.memory["inputs"] += int(job.patches / job.layout.batch_shards * vision.patch_dim * F32)


def _state(job: Job, cost: Cost) -> None:
    """Parameters and what the optimizer keeps, and the sum of gradients over replicas."""
    layout, count = job.layout, parameters(job.model)
    dense = layout.fsdp * layout.tensor
    layers = count["attention"] + count["mlp"] + count["router"]
    kv_whole = job.model.text.num_key_value_heads % layout.tensor != 0
    local = layers / (dense * layout.stage) + count["experts"] / (dense * layout.stage * layout.expert)
    local += (count["embedding"] + count["vision"]) / dense + count["norms"]
    if kv_whole:
        text = job.model.text
        kv = 2 * text.num_hidden_layers * text.hidden_size * text.num_key_value_heads * text.head_dim
        local += kv / layout.fsdp / layout.stage * (1 - 1 / layout.tensor)
    for kind, size in STATE.items():
        cost.memory[kind] += int(local * size)
    if job.micro_batches > 1:
        cost.memory["gradients"] += int(local * F32)  # the sum beside the newest
    cost.hbm["optimizer"] += int(local * (3 * F32 * 2 + F32 * 2 + BF16))
    # Gradients are summed over the axes that a weight is not split over.
    experts = count["experts"] / (dense * layout.stage * layout.expert)
    _reduce(cost, layout, (local - experts) * BF16 * job.micro_batches, ("expert", "sequence", "data"))
    _reduce(cost, layout, experts * BF16 * job.micro_batches, ("sequence", "data"))


def _reduce(cost: Cost, layout: Layout, size: float, axes: tuple[str, ...]) -> None:
    """An all-reduce over several axes: the fastest first, each of the others on what is then left."""
    for axis in axes:
        cost.sent[axis] += int(2 * size * _ring(getattr(layout, axis)))
        size /= getattr(layout, axis)


def _ring(devices: int) -> float:
    return (devices - 1) / devices
