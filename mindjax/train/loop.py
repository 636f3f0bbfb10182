"""The loop around a training step: resume, prefetch, metrics, checkpoints, stopping. SFT and DPO share it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mindjax.data.loader import Loader
from mindjax.train.checkpoint import Checkpointer
from mindjax.train.metrics import MetricsWriter, Progress
from mindjax.train.optimizer import OptimizerConfig, learning_rate
from mindjax.train.state import TrainState
from mindjax.train.step import Metrics, TrainStep

Params = dict[str, Any]


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


class NotFiniteError(ValueError):
    """A loss or gradient became NaN or infinite; the message says where the batch is."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C or SIGTERM), and saved its state first."""


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
    evaluate: Callable[[Params], dict[str, float]] | None = None,
    evaluate_every: int = 0,
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
      workdir: for `metrics.jsonl`, `tensorboard/`, `checkpoints/`.
      identity: see `Checkpointer`.
      checkpoint_every: steps between checkpoints; 0 saves at the end alone.
      keep: checkpoints that stay.
      evaluate: called with the parameters; its values are written beside the step's.
      evaluate_every: steps between calls of `evaluate`; 0 evaluates at the end alone.

    Raises:
      NotFiniteError: a loss or gradient was not finite; `<workdir>/nan_batch.npz` holds the batch.
      Interrupted: after a signal, with the state saved.
      ValueError: the checkpoint in `workdir` belongs to another configuration.
    """
    began, total = time.monotonic(), len(loader)
    tokens, last = 0, {}
    pending: tuple[int, Metrics, Any, float, int] | None = None  # of the step under way

    def report() -> None:
        """Fetches and writes the metrics of the step under way."""
        nonlocal pending, last
        if pending is None:
            return
        number, metrics, batch, rate, count = pending
        pending = None
        values = {key: float(a) / max(float(b), 1.0) for key, (a, b) in jax.device_get(metrics).items()}
        if not np.isfinite([values["loss"], values["grad_norm"]]).all():
            raise NotFiniteError(save_bad_batch(Path(workdir), number, values, batch, rate))
        last = {**values, "learning_rate": rate, "tokens": count, "seconds": time.monotonic() - began}
        if evaluate and (number == total or (evaluate_every and number % evaluate_every == 0)):
            last |= evaluate(state.params)
        run.writer.write(number, last)
        run.progress.update(number, {"loss": values["loss"]}, count)

    with Run(workdir, identity, state, name, total, checkpoint_every=checkpoint_every, keep=keep) as run:
        state, done = run.state, run.done
        for batch, count in loader.iterate(done):
            rate = learning_rate(optimizer, done, total)
            state, metrics = step(state, batch, rate)
            report()
            done, tokens = done + 1, tokens + count
            pending = (done, metrics, batch, rate, count)
            if evaluate and evaluate_every and done % evaluate_every == 0:
                report()  # before the state is donated to the next step
            if run.saves_after(done):
                report()  # before saving: a state that is not finite is never saved
                run.save(done, state)
    return TrainResult(state.params, done, time.monotonic() - began, tokens, last)


class Run(ExitStack):
    """What stands around the steps of every run: newest checkpoint, metrics, progress line, saving and stopping.

    Use it as a context manager.

    Args:
      workdir, identity, name, checkpoint_every, keep: see `fit`.
      state: a fresh one; afterwards `run.state`, the newest checkpoint's if there is one, where `run.done` steps are
        finished, and `run.extra`, what `save` was given beside it.
      total: steps.
      updates_per_step: by how much a step advances `state.step`.

    Raises:
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
        self._workdir, self._total, self._checkpoint_every = workdir, total, checkpoint_every
        self._checkpointer = Checkpointer(workdir, identity, keep=keep)
        self.callback(self._checkpointer.close)
        self.state = self._checkpointer.restore(state) or state
        self.extra = self._checkpointer.extra
        self.done = int(self.state.step) // updates_per_step
        self.writer, self.progress = MetricsWriter(workdir, self.done), Progress(name, self.done, total)
        self.callback(self.writer.close)
        self.callback(self.progress.close)
        self._stop = self.enter_context(stop_signals())

    def saves_after(self, step: int) -> bool:
        """Whether the state is to be saved now: after the last step, every so many, and where a signal came."""
        return self.due(step) or self._stop.is_set()

    def due(self, step: int) -> bool:
        """Whether the state is saved after this step even if no signal comes."""
        return step == self._total or (self._checkpoint_every > 0 and step % self._checkpoint_every == 0)

    def save(self, step: int, state: TrainState, extra: Mapping[str, Any] | None = None) -> None:
        """Saves the state, and with it what else the run stands at, JSON-able.

        Raises:
          Interrupted: a signal came; all is saved, but there is more to do.
        """
        self.writer.sync()
        self._checkpointer.save(int(state.step), state, extra)
        if self._stop.is_set() and step < self._total:
            raise Interrupted(
                f"stopped after step {step} of {self._total}, saved in {self._workdir}; run the same command to go on"
            )


def save_bad_batch(workdir: Path, step: int, values: dict[str, float], batch: Any, rate: float) -> str:
    """Writes the batch and returns what to tell the user."""
    path = workdir / "nan_batch.npz"
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    arrays: dict[str, Any] = {
        jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf) for key, leaf in leaves
    }
    np.savez(path, **arrays)
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
    return (
        f"step {step} is not finite ({numbers}, learning rate {rate:.3g}). Its batch is in {path}; the last "
        "checkpoint is from before it. A lower learning rate, more warm-up or a smaller clip_norm often helps."
    )


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
