"""Program of test_several.py: a few steps of SFT on the smallest model, in one process or in several.

    python -m tests.train.several LAYOUT WORKDIR [STEPS]

The first process prints, as the last line, JSON: the losses in metrics.jsonl; and writes `WORKDIR/params.npz`, one
array for each parameter. With `KILL_AT=N` in the environment, process 1 kills itself before its N-th step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mindjax.sft.train import SFTConfig, train
from mindjax.train.metrics import read_metrics
from mindjax.train.optimizer import OptimizerConfig
from mindjax.train.step import TrainStep
from sharding.layout import Layout
from sharding.processes import is_first, start
from tests.train import tiny


def main(layout: str, workdir: str, steps: int = 6) -> None:
    start()
    if kill_at := int(os.environ.get("KILL_AT", "0")):
        _kill_in_step(kill_at)
    config = SFTConfig(
        steps=steps,
        rows=2,
        length=32,
        micro_batches=4,
        checkpoint_every=2,
        layout=Layout.parse(layout),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    )
    model = tiny.model()
    result = train(config, model, tiny.init(model), tiny.samples(24), workdir, shape=tiny.SHAPE)
    whole = {
        jax.tree_util.keystr(path): np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        for path, leaf in jax.tree_util.tree_leaves_with_path(result.params)
    }
    if is_first():
        np.savez(Path(workdir) / "params.npz", **whole)  # type: ignore[arg-type]
        losses = [[record["loss"], record["grad_norm"], record["tokens"]] for record in read_metrics(Path(workdir))]
        print(json.dumps({"losses": losses, "processes": jax.process_count()}))


def _kill_in_step(number: int) -> None:
    call, seen = TrainStep.__call__, 0

    def counted(self: TrainStep, *arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, *arguments)

    TrainStep.__call__ = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
