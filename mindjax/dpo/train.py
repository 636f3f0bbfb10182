"""Direct Preference Optimization: chosen and rejected replies to one prompt, side by side in packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mindjax.config import ModelConfig
from mindjax.data.loader import Loader, Rows, fingerprint
from mindjax.data.packing import BatchShape, Plan, SampleSize, pack, plan, size_of
from mindjax.data.placing import placement, shards_of_process
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered, render
from mindjax.data.samples import DataConfig
from mindjax.experiment import to_dataclass
from mindjax.losses.dpo import dpo_loss
from mindjax.models import qwen3_vl
from mindjax.models.spread import check_batch
from mindjax.train.folder import export, open_model
from mindjax.train.loop import TrainResult, fit
from mindjax.train.optimizer import OptimizerConfig
from mindjax.train.spikes import SpikeConfig
from mindjax.train.state import TrainState
from mindjax.train.step import Terms, router_term, train_step
from mindjax.types import Array, Batch, Sample
from sharding.layout import Layout
from sharding.parallel import Parallel
from sharding.processes import is_first
from sharding.remat import Remat

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Params = dict[str, Any]


@dataclass(frozen=True)
class DPOConfig:
    """Preference optimization.

    Attributes:
      beta: how sharply a difference of log-probabilities counts.
      reference: whether log-ratios to the starting parameters take the place of log-probabilities.
      epochs, steps, rows, length, micro_batches, optimizer, remat, layout, dtype, seed, drop_too_long,
        checkpoint_every, keep_checkpoints, spikes, check_replicas_every: as in SFT; a pair lies in one row, so `length`
        holds at least two conversations.
    """

    beta: float = 0.1
    reference: bool = False
    epochs: int | None = None
    steps: int | None = None
    rows: int = 8
    length: int = 0
    micro_batches: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    remat: Remat = "none"
    layout: Layout = field(default_factory=Layout)
    dtype: str = "float32"
    seed: int = 0
    drop_too_long: bool = False
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    check_replicas_every: int = 0


# What may change when a run is resumed; all else is part of its identity.
FREE_TO_CHANGE = ("checkpoint_every", "keep_checkpoints", "remat", "layout", "spikes", "check_replicas_every")


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in their last reply; only it carries loss, and both share the frames."""

    chosen: Rendered
    rejected: Rendered


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairBatch:
    """Packed pairs.

    Attributes:
      batch: the rows; `loss_mask` is 1 on the two last replies.
      reply_ids: [B, T] int32, 2 p + 1 on the chosen and 2 p + 2 on the rejected reply of pair p, 0 elsewhere.
      valid: [pairs] float32, 1 where there is a pair.
      reference: [pairs, 2] float32 log-probabilities of chosen and rejected reply under the reference, or None.
    """

    batch: Batch
    reply_ids: Array
    valid: Array
    reference: Array | None

    def shifted(self, shard: int, merge_size: int) -> PairBatch:
        """As shard number `shard` of a larger batch whose shards have equal shapes; pairs are numbered over all."""
        if not shard:
            return self
        offset = shard * 2 * self.valid.shape[-1]
        ids: Any = np.where(self.reply_ids > 0, self.reply_ids + offset, 0)
        return replace(self, batch=self.batch.shifted(shard, merge_size), reply_ids=ids)


@dataclass(frozen=True)
class DPOLoss:
    """Packed pairs to loss terms; equal ones share a compiled step."""

    model: ModelConfig
    beta: float
    remat: Remat
    parallel: Parallel | None = None

    def __call__(self, params: Params, pairs: PairBatch) -> Terms:
        batch = pairs.batch
        out = qwen3_vl.token_logprobs(
            params, self.model, batch, mask=batch.loss_mask, remat=self.remat, parallel=self.parallel
        )
        logp = reply_logprobs(out.logp, pairs)
        reference = pairs.reference
        loss = dpo_loss(
            logp[:, 0],
            logp[:, 1],
            beta=self.beta,
            ref_chosen=None if reference is None else reference[:, 0],
            ref_rejected=None if reference is None else reference[:, 1],
            valid=pairs.valid,
        )
        return (loss,) if out.router is None else (loss, router_term(out.router, self.model))


def reply_logprobs(logp: Array, pairs: PairBatch) -> Array:
    """[B, T] log-probabilities of tokens to [pairs, 2] of chosen and rejected replies, summed over their tokens."""
    count = 2 * pairs.valid.shape[0]
    counted = jnp.where(pairs.batch.loss_mask > 0, logp, 0.0)
    sums = jax.ops.segment_sum(counted.reshape(-1), pairs.reply_ids.reshape(-1), count + 1)
    return sums[1:].reshape(-1, 2)


def render_pair(sample: Sample, processor: Processor) -> Pair:
    """Renders a preference sample, whose last message is the chosen reply and `rejected` the other.

    Raises:
      ValueError: there is no rejected reply, or no reply to compare it with.
    """
    *prompt, last = sample.messages
    if sample.rejected is None or last["role"] != "assistant":
        raise ValueError(
            f"sample {sample.id!r} is no preference pair: it needs a last assistant message and 'rejected'"
        )
    chosen = _last_reply_only(render([*prompt, last], processor))
    rejected = _last_reply_only(render([*prompt, {**last, "content": sample.rejected}], processor))
    # The same prompt: one copy of its images is packed and encoded for both.
    return Pair(chosen, replace(rejected, frames=chosen.frames))


def pack_pairs(rows: Rows, pairs: Sequence[Pair], shape: BatchShape, reference: np.ndarray | None) -> PairBatch:
    """Lays the pairs with these indices into rows, chosen before rejected.

    Args:
      rows: the indices of the pairs in each row.
      pairs: all of them.
      shape: of the batch; its rows hold at most `max_pairs(shape)` pairs.
      reference: [all pairs, 2] reference log-probabilities, or None.
    """
    packed = [[item for i in row for item in (pairs[i].chosen, pairs[i].rejected)] for row in rows]
    batch = pack(packed, shape)
    reply_ids: Any = np.zeros(batch.tokens.shape, np.int32)
    indices = [i for row in rows for i in row]
    number = 1
    for row, items in enumerate(packed):
        for segment in range(1, len(items) + 1):
            reply = (np.asarray(batch.segment_ids[row]) == segment) & (np.asarray(batch.loss_mask[row]) > 0)
            reply_ids[row, reply] = number
            number += 1
    slots = max_pairs(shape)
    valid: Any = (np.arange(slots) < len(indices)).astype(np.float32)
    if reference is None:
        return PairBatch(batch, reply_ids, valid, None)
    values: Any = np.zeros((slots, 2), np.float32)
    values[: len(indices)] = reference[indices]
    return PairBatch(batch, reply_ids, valid, values)


def max_pairs(shape: BatchShape) -> int:
    """A static bound on the pairs of a batch: a reply and what it answers take at least two tokens."""
    return shape.rows * shape.length // 4


def train(
    config: DPOConfig,
    model: ModelConfig,
    params: Params,
    pairs: Sequence[Pair],
    workdir: str | Path,
    *,
    name: str = "dpo",
    shape: BatchShape | None = None,
) -> TrainResult:
    """Runs DPO to its end, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: see `DPOConfig`.
      model: shapes of the model.
      params: where it starts, and the reference if there is one; they stay valid.
      pairs: from `render_pair`.
      workdir: for metrics, checkpoints and TensorBoard.
      name: first in the progress line.
      shape: of a micro-batch; None chooses it from the pairs.

    Raises:
      ValueError: pairs that fit no row, a checkpoint of another configuration.
      NotFiniteError: loss or gradient is not finite.
      Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
    """
    workdir = Path(workdir)
    sizes = [_size(pair) for pair in pairs]
    shape = shape or BatchShape.for_sizes(sizes, config.rows, model.vision, length=config.length)
    parallel = Parallel.of(config.layout)
    check_batch(config.layout, shape.rows * config.layout.batch_shards, shape.length)
    shardings = None if parallel is None else qwen3_vl.shardings(model, parallel)
    loss = DPOLoss(model, config.beta, config.remat, parallel)
    step = train_step(loss, config.optimizer, config.dtype)
    if shardings is not None:
        params = jax.device_put(params, shardings)
    reference = _reference(config, model, params, pairs, sizes, shape, parallel) if config.reference else None
    loader = _loader(config, pairs, sizes, shape, reference, parallel)
    if loader.dropped and is_first():
        print(f"{name}: left out {len(loader.dropped)} of {len(pairs)} pairs that fit no row of {shape}")
    identity = {
        "dpo": {key: value for key, value in asdict(config).items() if key not in FREE_TO_CHANGE},
        "model": asdict(model),
        "shape": asdict(shape),
        "data": {"pairs": fingerprint([item for pair in pairs for item in (pair.chosen, pair.rejected)])},
    }
    return fit(
        step,
        TrainState.create(params, config.optimizer, jax.random.key(config.seed), shardings),
        loader,
        name=name,
        optimizer=config.optimizer,
        workdir=workdir,
        identity=identity,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep_checkpoints,
        place=placement(parallel, shape),
        spikes=config.spikes,
        check_replicas_every=config.check_replicas_every,
    )


def _loader(
    config: DPOConfig,
    pairs: Sequence[Pair],
    sizes: Sequence[SampleSize],
    shape: BatchShape,
    reference: np.ndarray | None,
    parallel: Parallel | None,
) -> Loader:
    def plan_epoch(epoch: int) -> Plan:
        return plan(sizes, shape, seed=config.seed, epoch=epoch, drop_too_long=config.drop_too_long)

    return Loader(
        plan_epoch,
        lambda rows: pack_pairs(rows, pairs, shape, reference),
        sizes,
        micro_batches=config.micro_batches,
        epochs=config.epochs,
        steps=config.steps,
        shards=config.layout.batch_shards,
        mine=None if parallel is None else shards_of_process(parallel.mesh),
    )


def _reference(
    config: DPOConfig,
    model: ModelConfig,
    params: Params,
    pairs: Sequence[Pair],
    sizes: Sequence[SampleSize],
    shape: BatchShape,
    parallel: Parallel | None,
) -> np.ndarray:
    """[pairs, 2] log-probabilities under the starting parameters."""
    shards = config.layout.batch_shards
    one_epoch = replace(config, epochs=1, steps=None, micro_batches=shards)
    loader, place = _loader(one_epoch, pairs, sizes, shape, None, parallel), placement(parallel, shape)
    params = jax.tree.map(lambda p: p.astype(config.dtype), params)
    result = np.zeros((len(pairs), 2), np.float32)

    def logprobs(params: Params, batch: PairBatch) -> Array:
        out = qwen3_vl.token_logprobs(params, model, batch.batch, mask=batch.batch.loss_mask, parallel=parallel)
        return reply_logprobs(out.logp, batch)

    whole = None if parallel is None else NamedSharding(parallel.mesh, PartitionSpec())
    compiled = jax.jit(logprobs, out_shardings=whole)  # every process needs all of them
    for step, (parts, _) in enumerate(loader.iterate()):
        values = np.asarray(compiled(params, jax.tree.map(lambda x: x[0], place(parts))))
        for shard, of_shard in enumerate(values.reshape(shards, -1, 2)):
            indices = loader.indices(step, shard)
            result[indices] = of_shard[: len(indices)]
    return result


def _size(pair: Pair) -> SampleSize:
    chosen, rejected = size_of(pair.chosen), size_of(pair.rejected)
    return SampleSize(chosen.tokens + rejected.tokens, chosen.frames)


def _last_reply_only(rendered: Rendered) -> Rendered:
    """The same with loss on its last reply alone: earlier ones are the same for both, and cancel but for rounding."""
    (targets,) = np.nonzero(rendered.loss_mask)
    breaks = np.nonzero(np.diff(targets) > 1)[0]
    mask = np.zeros_like(rendered.loss_mask)
    mask[targets[breaks[-1] + 1 if len(breaks) else 0 :]] = 1
    return replace(rendered, loss_mask=mask)


@dataclass(frozen=True)
class DPORun:
    """What an experiment of kind "dpo" sets.

    Attributes:
      model: a model folder, or a catalog name for random weights.
      train: see `DPOConfig`.
      data: preference pairs.
      max_pixels: of an image; 0 leaves the processor's own limit. A model without a folder needs one.
    """

    model: str
    train: DPOConfig
    data: DataConfig
    max_pixels: int = 0


def main(config: ConfigDict, workdir: Path) -> None:
    """Optimizes a model on preference pairs and writes the result, an HF folder, to `<workdir>/model`."""
    run = to_dataclass(DPORun, {key: value for key, value in config.items() if key != "kind"})
    samples = run.data.load()
    model, params, processor = open_model(run.model, samples, run.max_pixels, run.train.layout)
    pairs = [render_pair(sample, processor) for sample in samples]
    result = train(run.train, model, params, pairs, workdir)
    export(workdir / "model", model, result.params, processor)
    if is_first():
        print(f"{result.steps} steps; the model is in {workdir / 'model'}")
