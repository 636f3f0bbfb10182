"""The loop around a training step: resume, prefetch, metrics, checkpoints, stopping. SFT and DPO share it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mindjax.data.loader import Loader
from mindjax.train.agreement import AnyProcess
from mindjax.train.checkpoint import Checkpointer
from mindjax.train.metrics import MetricsWriter, Progress
from mindjax.train.optimizer import OptimizerConfig, learning_rate
from mindjax.train.replicas import DivergedError, ReplicaCheck
from mindjax.train.spikes import LOG, NO_LIMITS, SpikeConfig, SpikeWatch, describe, save_batch
from mindjax.train.state import TrainState
from mindjax.train.step import Metrics, TrainStep
from mindjax.types import Array
from sharding.processes import is_first
from sharding.watchdog import Watchdog

Params = dict[str, Any]
NOT_FINITE, SPIKE, DIVERGED = "nan_batch.npz", "spike_batch.npz", "diverged_batch.npz"


@dataclass(frozen=True)
class TrainResult:
    """What a training run leaves.

    Attributes:
      params: all parameters after the last step.
      steps: updates made since the run began, resumed ones included.
      seconds: of this call, compilation included.
      tokens: non-padding tokens seen by this call.
      metrics: of the last step; {} where a finished run was only restored.
    """

    params: Params
    steps: int
    seconds: float
    tokens: int
    metrics: dict[str, float]


class SpikeError(ValueError):
    """A loss or gradient was far above what it had been, or too many were; the message says where the batch is."""


class NotFiniteError(SpikeError):
    """A loss or gradient became NaN or infinite; the message says where the batch is."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C or SIGTERM), and saved its state first."""


@dataclass(frozen=True)
class _Pending:
    """A step under way: what `fit` knows of it, and what it will fetch.

    Attributes:
      number: of the step, from 1.
      metrics, sums: on the device, see `TrainStep` and `ReplicaCheck`.
      batch: what this process holds of it, in host memory; by shard where there are several.
      rate: of learning.
      limits: see `SpikeWatch`.
      tokens: in the batch, not padding.
    """

    number: int
    metrics: Metrics
    batch: Any
    rate: float
    limits: tuple[float, float]
    tokens: int
    sums: Array | None


def fit(
    step: TrainStep,
    state: TrainState,
    loader: Loader,
    *,
    name: str,
    optimizer: OptimizerConfig,
    workdir: str | Path,
    identity: Mapping[str, Any],
    checkpoint_every: int = 0,
    keep: int = 2,
    place: Callable[[Mapping[int, Any]], Any] = lambda parts: parts[0],
    evaluate: Callable[[Params], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    spikes: SpikeConfig | None = None,
    check_replicas_every: int = 0,
) -> TrainResult:
    """Runs the remaining steps of a run, from its newest checkpoint if there is one.

    The host is one step ahead of what it reports: while the device works on a step, the metrics of the one before are
    fetched, so no step waits for the host.

    Args:
      step: see `train_step`.
      state: a fresh state; a checkpoint's is used instead where one exists.
      loader: `len(loader)` is the number of steps, `loader.iterate(start)` yields their batches.
      name: first in the progress line.
      optimizer: gives the learning rate of each step.
      workdir: for `metrics.jsonl`, `tensorboard/`, `checkpoints/`, and what is kept of bad steps.
      identity: see `Checkpointer`.
      checkpoint_every: steps between checkpoints; 0 saves at the end alone.
      keep: checkpoints that stay.
      place: makes a batch for the devices from what the loader gives, see `mindjax.data.placing`.
      evaluate: called with the parameters; its values are written beside the step's.
      evaluate_every: steps between calls of `evaluate`; 0 evaluates at the end alone.
      spikes: what becomes of steps whose loss or gradient is not finite, or a spike; None stops at the first.
      check_replicas_every: steps between comparisons of the copies of parameters on all devices; 0 makes none.

    Raises:
      NotFiniteError: a loss or gradient was not finite; `<workdir>/nan_batch.npz` holds the batch.
      SpikeError: it was a spike (`<workdir>/spike_batch.npz`), or there were more of either than `spikes` allows.
      DivergedError: copies of a parameter differ; `<workdir>/diverged_batch.npz` holds the batch.
      Interrupted: after a signal, with the state saved.
      CheckpointError: a checkpoint could not be written or is damaged.
      ValueError: the checkpoint in `workdir` belongs to another configuration.
    """
    began, total, per_step = time.monotonic(), len(loader), loader.groups_per_step
    spikes = spikes or SpikeConfig()
    tokens, last = 0, {}
    pending: _Pending | None = None

    def report() -> bool:
        """Fetches and writes the metrics of the step under way; False where `state` was taken back after it."""
        nonlocal pending, last, state
        if pending is None:
            return True
        now, pending = pending, None
        values = {key: float(a) / max(float(b), 1.0) for key, (a, b) in jax.device_get(now.metrics).items()}
        try:
            replicas.finish(now.number, now.sums)
        except DivergedError as error:
            raise DivergedError(f"{error}. The batch is in {save_batch(run.workdir / DIVERGED, now.batch)}") from None
        good = watch.add(now.number, values)
        if not good:
            state = after_bad_step(now, values)
        last = {**values, "learning_rate": now.rate, "tokens": now.tokens, "seconds": time.monotonic() - began}
        if evaluate and (now.number == total or (evaluate_every and now.number % evaluate_every == 0)):
            last |= evaluate(state.params)
        run.report(now.number, last, {"loss": values["loss"]}, now.tokens)
        return good or spikes.policy != "rewind"

    def after_bad_step(now: _Pending, values: dict[str, float]) -> TrainState:
        """Keeps the batch and does what the policy says; returns the state to go on from."""
        if spikes.policy == "stop":
            raise _bad_step(run.workdir, now, values, ' Or let the run go on: spikes.policy = "skip" or "rewind".')
        result, left_out = state, [now.number, now.number]
        if spikes.policy == "rewind":
            result, saved = run.rewind(state, now.number)
            left_out = [saved + 1, now.number]
        numbers = {"loss": values["loss"], "grad_norm": values["grad_norm"], "learning_rate": now.rate}
        groups = [(left_out[0] - 1) * per_step, now.number * per_step - 1]
        record = {"policy": spikes.policy, "left_out": left_out, "groups": groups, **numbers}
        watch.keep(now.number, now.batch, record)
        if watch.too_many():
            raise _bad_step(
                run.workdir,
                now,
                values,
                f" It is bad step number {spikes.allowed + 1} of the last {spikes.window}, more than spikes.allowed; "
                f"{LOG} lists them.",
            )
        return result

    with Run(workdir, identity, state, name, total, checkpoint_every=checkpoint_every, keep=keep) as run:
        state, done = run.state, run.done
        watch = SpikeWatch(spikes, workdir, done, run.extra.get("recent", ()))
        replicas = ReplicaCheck(state.params)
        if spikes.policy == "rewind" and run.fresh:
            run.save(0, state)  # for a spike before the first checkpoint
        for parts, count in loader.iterate(done):
            batch = place(parts)
            rate, limits = learning_rate(optimizer, done, total), watch.limits(done + 1)
            state, metrics = step(state, batch, rate, limits)
            if not report():
                state, metrics = step(state, batch, rate, limits)
            done, tokens = done + 1, tokens + count
            checked = check_replicas_every > 0 and done % check_replicas_every == 0
            sums = replicas.start(state.params) if checked else None
            held = next(iter(parts.values())) if len(parts) == 1 else parts
            pending = _Pending(done, metrics, held, rate, limits, count, sums)
            if evaluate and evaluate_every and done % evaluate_every == 0:
                report()  # before the state is donated to the next step
            if run.saves_after(done):
                report()  # before saving: a state that is not finite is never saved
                run.save(done, state, {"groups": done * per_step, "recent": watch.recent})
    return TrainResult(state.params, done, time.monotonic() - began, tokens, last)


class Run(ExitStack):
    """What stands around the steps of every run: newest checkpoint, metrics, progress line, saving and stopping.

    Use it as a context manager.

    Args:
      workdir, identity, name, checkpoint_every, keep: see `fit`.
      state: a fresh one; afterwards `run.state`, the newest checkpoint's if there is one (else `run.fresh`), where
        `run.done` steps are finished, and `run.extra`, what `save` was given beside it.
      total: steps.
      updates_per_step: by how much a step advances `state.step`.

    With several processes, all of them make the same calls; the first alone writes numbers and prints.

    Raises:
      CheckpointError: the newest checkpoint is damaged, or the folder cannot be written.
      ValueError: the checkpoint in `workdir` belongs to another configuration.
    """

    def __init__(
        self,
        workdir: str | Path,
        identity: Mapping[str, Any],
        state: TrainState,
        name: str,
        total: int,
        *,
        checkpoint_every: int,
        keep: int,
        updates_per_step: int = 1,
    ):
        super().__init__()
        self.workdir, self._total, self._checkpoint_every = Path(workdir), total, checkpoint_every
        self._checkpointer = Checkpointer(workdir, identity, keep=keep)
        self.callback(self._checkpointer.close)
        restored = self._checkpointer.restore(state)
        self.fresh, self.state = restored is None, restored or state
        self.extra = self._checkpointer.extra
        self.done = int(self.state.step) // updates_per_step
        self._writer: MetricsWriter | None = None
        if is_first():
            self._writer, self._progress = MetricsWriter(workdir, self.done), Progress(name, self.done, total)
            self.callback(self._writer.close)
            self.callback(self._progress.close)
        self._signal, self._any = self.enter_context(stop_signals()), AnyProcess()
        self._watchdog = self.enter_context(Watchdog())
        self._stopping = False

    def report(self, step: int, values: dict[str, float], shown: dict[str, float], tokens: int) -> None:
        """Writes the numbers of a finished step, and shows some of them."""
        if self._writer is not None:
            self._writer.write(step, values)
            self._progress.update(step, shown, tokens)

    def saves_after(self, step: int) -> bool:
        """Whether the state is to be saved now: after the last step, every so many, and where a signal came.

        Call it once after every step. A signal to one process counts for all, at the same step.

        Raises:
          CheckpointError: the last save, in the background, failed.
        """
        self._watchdog.beat()
        self._checkpointer.poll()
        self._stopping |= self._any(self._signal.is_set())
        return self.due(step) or self._stopping

    def due(self, step: int) -> bool:
        """Whether the state is saved after this step even if no signal comes."""
        return step == self._total or (self._checkpoint_every > 0 and step % self._checkpoint_every == 0)

    def save(self, step: int, state: TrainState, extra: Mapping[str, Any] | None = None) -> None:
        """Saves the state, and with it what else the run stands at, JSON-able.

        Raises:
          Interrupted: a signal came; all is saved, but there is more to do.
          CheckpointError: this or the last save failed.
        """
        if self._writer is not None:
            self._writer.sync()
        self._checkpointer.save(int(state.step), state, extra)
        if self._stopping and step < self._total:
            raise Interrupted(
                f"stopped after step {step} of {self._total}, saved in {self.workdir}; run the same command to go on"
            )

    def rewind(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """The newest checkpoint's state, standing after `step` in the data, and the step that it was saved after.

        Args:
          state: gives shapes and placement; its buffers are freed.
          step: where the data goes on; a step is one update here.
        """
        restored = self._checkpointer.restore(state, free=True)
        assert restored is not None, "a run that rewinds saves before its first step"
        saved = int(restored.step)
        return replace(restored, step=restored.step + (step - saved)), saved


def save_bad_batch(
    workdir: Path,
    step: int,
    values: Mapping[str, float],
    batch: Any,
    rate: float,
    limits: tuple[float, float] = NO_LIMITS,
) -> str:
    """Writes the batch of a bad step and returns what to tell the user."""
    finite = np.isfinite([values["loss"], values["grad_norm"]]).all()
    path = save_batch(workdir / (SPIKE if finite else NOT_FINITE), batch)
    return (
        f"{describe(step, values, limits, rate)}. Its batch is in {path}; the last checkpoint is from before it. "
        "A lower learning rate, more warm-up or a smaller clip_norm often helps."
    )


def _bad_step(workdir: Path, step: _Pending, values: Mapping[str, float], advice: str) -> SpikeError:
    text = save_bad_batch(workdir, step.number, values, step.batch, step.rate, step.limits) + advice
    finite = np.isfinite([values["loss"], values["grad_norm"]]).all()
    return SpikeError(text) if finite else NotFiniteError(text)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one acts at once, as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        stop.set()
        restore()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
