"""The smallest run: three numbers drawn towards the data, one sample a row, four rows a step; compiles in no time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.data.loader import Loader
from mindjax.data.packing import BatchShape, SampleSize, plan
from mindjax.train.loop import TrainResult, fit
from mindjax.train.metrics import read_metrics
from mindjax.train.optimizer import OptimizerConfig
from mindjax.train.state import TrainState
from mindjax.train.step import train_step
from mindjax.types import LossOutput

CONFIG = OptimizerConfig(learning_rate=0.1, warmup_steps=2)
STEPS, ROWS = 10, 4
VALUES = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def squared_distance(params: dict[str, Any], batch: dict[str, Any]) -> LossOutput:
    distance = jnp.sum((params["w"] - batch["x"]) ** 2)
    return LossOutput(distance, jnp.float32(batch["x"].shape[0]))


def loader(values: np.ndarray = VALUES, steps: int = STEPS) -> Loader:
    sizes = [SampleSize(1)] * len(values)
    shape = BatchShape(rows=ROWS, length=1)
    return Loader(
        lambda epoch: plan(sizes, shape, epoch=epoch),
        lambda rows: {"x": np.stack([values[i] for row in rows for i in row])},
        sizes,
        steps=steps,
    )


def fresh() -> TrainState:
    return TrainState.create({"w": jnp.zeros(3)}, CONFIG, jax.random.key(0))


def run(
    workdir: Path,
    values: np.ndarray = VALUES,
    before: Callable[[int], None] = lambda number: None,
    steps: int = STEPS,
    state: TrainState | None = None,
    change: Callable[[int, TrainState], TrainState] = lambda number, state: state,
    **options: Any,
) -> TrainResult:
    """A run; `before` is called with the number of each call of the step, `change` may give it another state."""
    step = train_step(squared_distance, CONFIG)
    number = 0

    def observed(state: TrainState, batch: Any, rate: float, limits: tuple[float, float]) -> Any:
        nonlocal number
        number += 1
        before(number)
        return step(change(number, state), batch, rate, limits)

    return fit(
        observed,
        fresh() if state is None else state,
        loader(values, steps),
        name="test",
        optimizer=CONFIG,
        workdir=workdir,
        identity={},
        **options,
    )


def losses(workdir: Path) -> list[tuple[float, float, float]]:
    return [(record["step"], record["loss"], record["learning_rate"]) for record in read_metrics(workdir)]
