"""Supervised fine-tuning: one stage, in process (`train`) or from the command line (`main`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax

from mindjax.config import ModelConfig
from mindjax.data.loader import Loader, RenderedSamples, digest, fingerprint
from mindjax.data.packing import BatchShape, Plan, pack, plan, size_of
from mindjax.data.placing import placement, shards_of_process
from mindjax.data.render import Rendered
from mindjax.data.samples import DataConfig
from mindjax.experiment import to_dataclass
from mindjax.losses.sft import sft_loss
from mindjax.models import qwen3_vl
from mindjax.models.spread import check_batch
from mindjax.train.folder import export, open_model
from mindjax.train.loop import TrainResult, fit
from mindjax.train.optimizer import OptimizerConfig
from mindjax.train.spikes import SpikeConfig
from mindjax.train.state import TrainState
from mindjax.train.step import Terms, eval_step, router_term, train_step
from mindjax.types import Batch, LossOutput
from sharding.layout import Layout
from sharding.parallel import Parallel
from sharding.processes import is_first
from sharding.remat import Remat

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Params = dict[str, Any]


@dataclass(frozen=True)
class SFTConfig:
    """One stage of supervised fine-tuning.

    Attributes:
      epochs, steps: how long; exactly one.
      rows, length: of a packed micro-batch; length 0 is the bucket of the longest sample. Stages with the same
        shape share a compiled step.
      vision_rows, vision_length: patch rows of a micro-batch; 0 chooses them from the data.
      micro_batches: accumulated into one update, exactly; over all devices, which take as many of them at once as the
        layout splits the batch in.
      average: see `sft_loss`.
      optimizer: see `OptimizerConfig`.
      remat: what a block keeps for its backward pass, see `sharding.remat`.
      layout: how the job is spread over devices; changes nothing but rounding.
      dtype: of the computation; parameters and optimizer stay float32.
      seed: of the order of the data.
      drop_too_long: leave out samples that fit no row (reported), instead of refusing them.
      checkpoint_every: steps; 0 saves at the end alone.
      keep_checkpoints: how many stay.
      evaluate_every: steps between held-out losses; 0 computes one at the end alone.
      spikes: what becomes of steps whose loss or gradient is not finite, or far above what it was.
      check_replicas_every: steps between comparisons of the parameters on devices that should hold the same; 0: none.
    """

    epochs: int | None = None
    steps: int | None = None
    rows: int = 8
    length: int = 0
    vision_rows: int = 0
    vision_length: int = 0
    micro_batches: int = 1
    average: Literal["token", "sample"] = "token"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    remat: Remat = "none"
    layout: Layout = field(default_factory=Layout)
    dtype: str = "float32"
    seed: int = 0
    drop_too_long: bool = False
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    check_replicas_every: int = 0


# What may change when a run is resumed; all else is part of its identity.
FREE_TO_CHANGE = ("checkpoint_every", "keep_checkpoints", "remat", "layout", "spikes", "check_replicas_every")


@dataclass(frozen=True)
class SFTLoss:
    """Packed batch to loss terms; equal ones share a compiled step."""

    model: ModelConfig
    average: Literal["token", "sample"]
    remat: Remat
    parallel: Parallel | None = None

    def __call__(self, params: Params, batch: Batch) -> Terms:
        out = qwen3_vl.token_logprobs(
            params, self.model, batch, mask=batch.loss_mask, remat=self.remat, parallel=self.parallel
        )
        loss = sft_loss(out.logp, batch.loss_mask, segment_ids=batch.segment_ids, average=self.average)
        targets = batch.loss_mask.sum()
        metrics = {
            "nll": (loss.sum, loss.count),
            "entropy": ((jax.lax.stop_gradient(out.entropy) * batch.loss_mask).sum(), targets),
        }
        main = LossOutput(loss.sum, loss.count, metrics)
        return (main,) if out.router is None else (main, router_term(out.router, self.model))


def choose_shape(config: SFTConfig, model: ModelConfig, samples: Sequence[Rendered]) -> BatchShape:
    """The batch shape of a stage; give the samples of all stages for one shape, and one compiled step, for all."""
    sizes = [size_of(rendered) for rendered in samples]
    shape = BatchShape.for_sizes(sizes, config.rows, model.vision, length=config.length)
    return replace(
        shape,
        vision_rows=config.vision_rows or shape.vision_rows,
        vision_length=config.vision_length or shape.vision_length,
    )


def train(
    config: SFTConfig,
    model: ModelConfig,
    params: Params,
    samples: Sequence[Rendered],
    workdir: str | Path,
    *,
    name: str = "sft",
    shape: BatchShape | None = None,
    difficulty: Sequence[float] | None = None,
    repeats: Sequence[float] | None = None,
    held_out: Sequence[Rendered] = (),
) -> TrainResult:
    """Runs a stage to its end, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: see `SFTConfig`.
      model: shapes of the model.
      params: where the stage starts; they stay valid.
      samples: rendered conversations, e.g. `RenderedSamples(samples, processor)`.
      workdir: for metrics, checkpoints and TensorBoard.
      name: first in the progress line.
      shape: of a micro-batch; None chooses it from the configuration and the samples.
      difficulty: per sample; the first epoch brings them in rising order, later ones mix them again, for a stage
        that ends with some of the samples alone loses some of the others.
      repeats: mean occurrences of each sample per epoch, see `epoch_order`.
      held_out: conversations whose loss is measured, `held_out_nll`.

    Raises:
      ValueError: samples that fit no row, a checkpoint of another configuration.
      NotFiniteError: loss or gradient is not finite.
      Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
    """
    workdir = Path(workdir)
    shape = shape or choose_shape(config, model, [*samples, *held_out])
    parallel, shards = Parallel.of(config.layout), config.layout.batch_shards
    check_batch(config.layout, shape.rows * shards, shape.length)
    shardings = None if parallel is None else qwen3_vl.shardings(model, parallel)
    loader = _loader(config, samples, shape, difficulty, repeats, parallel)
    if loader.dropped and is_first():
        print(f"{name}: left out {len(loader.dropped)} of {len(samples)} samples that fit no row of {shape}")
    loss = SFTLoss(model, config.average, config.remat, parallel)
    step = train_step(loss, config.optimizer, config.dtype)
    identity = {
        "sft": {key: value for key, value in asdict(config).items() if key not in FREE_TO_CHANGE},
        "model": asdict(model),
        "shape": asdict(shape),
        "data": {"samples": fingerprint(samples), "difficulty": digest(difficulty), "repeats": digest(repeats)},
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
        evaluate=_held_out(config, loss, held_out, shape) if held_out else None,
        evaluate_every=config.evaluate_every,
        spikes=config.spikes,
        check_replicas_every=config.check_replicas_every,
    )


def _loader(
    config: SFTConfig,
    samples: Sequence[Rendered],
    shape: BatchShape,
    difficulty: Sequence[float] | None,
    repeats: Sequence[float] | None,
    parallel: Parallel | None,
) -> Loader:
    sizes = [size_of(rendered) for rendered in samples]

    def plan_epoch(epoch: int) -> Plan:
        return plan(
            sizes,
            shape,
            seed=config.seed,
            epoch=epoch,
            difficulty=difficulty if epoch == 0 else None,
            repeats=repeats,
            drop_too_long=config.drop_too_long,
        )

    return Loader(
        plan_epoch,
        lambda rows: pack([[samples[i] for i in row] for row in rows], shape),
        sizes,
        micro_batches=config.micro_batches,
        epochs=config.epochs,
        steps=config.steps,
        shards=config.layout.batch_shards,
        mine=None if parallel is None else shards_of_process(parallel.mesh),
    )


def _held_out(
    config: SFTConfig, loss: SFTLoss, samples: Sequence[Rendered], shape: BatchShape
) -> Callable[[Params], dict[str, float]]:
    """A function that measures the mean loss on held-out samples."""
    one_epoch = replace(config, epochs=1, steps=None, micro_batches=config.layout.batch_shards)
    loader = _loader(one_epoch, samples, shape, None, None, loss.parallel)
    step, place = eval_step(loss, config.dtype), placement(loss.parallel, shape)

    def evaluate(params: Params) -> dict[str, float]:
        pairs = [step(params, place(parts))["nll"] for parts, _ in loader.iterate()]
        total, count = (sum(map(float, values)) for values in zip(*pairs, strict=True))
        return {"held_out_nll": total / max(count, 1.0)}

    return evaluate


@dataclass(frozen=True)
class SFTRun:
    """What an experiment of kind "sft" sets.

    Attributes:
      model: a model folder, or a catalog name for random weights.
      train: see `SFTConfig`.
      data: what to learn from.
      held_out: what the loss is only measured on; None measures nothing.
      max_pixels: of an image; 0 leaves the processor's own limit. A model without a folder needs one.
    """

    model: str
    train: SFTConfig
    data: DataConfig
    held_out: DataConfig | None = None
    max_pixels: int = 0


def main(config: ConfigDict, workdir: Path) -> None:
    """Fine-tunes a model on conversations and writes the result, an HF folder, to `<workdir>/model`."""
    run = to_dataclass(SFTRun, {key: value for key, value in config.items() if key != "kind"})
    samples = run.data.load()
    model, params, processor = open_model(run.model, samples, run.max_pixels, run.train.layout)
    held_out = RenderedSamples(run.held_out.load(), processor) if run.held_out else ()
    result = train(run.train, model, params, RenderedSamples(samples, processor), workdir, held_out=held_out)
    export(workdir / "model", model, result.params, processor)
    if is_first():
        print(f"{result.steps} steps; the model is in {workdir / 'model'}")
