"""Program of test_several.py: a few steps of SFT, DPO or GSPO on the smallest model, in one process or in several.

    python -m tests.train.several JOB LAYOUT WORKDIR STEPS

The first process prints, as the last line, JSON: the losses in metrics.jsonl; and writes `WORKDIR/params.npz`, one
array for each parameter. With `KILL_AT=N` in the environment, process 1 kills itself before its N-th step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mindjax.dpo.train import DPOConfig, Pair
from mindjax.dpo.train import train as train_dpo
from mindjax.rl.config import RLConfig
from mindjax.rl.rewards import RewardConfig
from mindjax.rl.train import train as train_rl
from mindjax.sft.train import SFTConfig
from mindjax.sft.train import train as train_sft
from mindjax.train.loop import TrainResult
from mindjax.train.metrics import read_metrics
from mindjax.train.optimizer import OptimizerConfig
from mindjax.train.step import TrainStep
from mindjax.types import Sample, Trajectory
from sharding.layout import Layout
from sharding.processes import is_first, start
from tests.rl.tiny import letters, policy
from tests.train import tiny


def main(job: str, layout: str, workdir: str, steps: str) -> None:
    start()
    if kill_at := int(os.environ.get("KILL_AT", "0")):
        _kill_in_step(kill_at)
    result = JOBS[job](Layout.parse(layout), Path(workdir), int(steps))
    whole = {
        jax.tree_util.keystr(path): np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        for path, leaf in jax.tree_util.tree_leaves_with_path(result.params)
    }
    if is_first():
        np.savez(Path(workdir) / "params.npz", **whole)  # type: ignore[arg-type]
        losses = [[record["loss"], record["grad_norm"], record["tokens"]] for record in read_metrics(Path(workdir))]
        print(json.dumps({"losses": losses, "processes": jax.process_count()}))


def sft(layout: Layout, workdir: Path, steps: int) -> TrainResult:
    config = SFTConfig(
        steps=steps, rows=2, length=32, micro_batches=4, checkpoint_every=2, layout=layout, optimizer=OPTIMIZER
    )
    model = tiny.model()
    return train_sft(config, model, tiny.init(model), tiny.samples(24), workdir, shape=tiny.SHAPE)


def dpo(layout: Layout, workdir: Path, steps: int) -> TrainResult:
    config = DPOConfig(
        reference=True, steps=steps, rows=2, length=64, micro_batches=4, layout=layout, optimizer=OPTIMIZER
    )
    pairs = []
    for chosen in tiny.samples(24):
        words = np.where(chosen.loss_mask > 0, (chosen.tokens + 1) % tiny.IMAGE_TOKEN, chosen.tokens)
        pairs.append(Pair(chosen, replace(chosen, tokens=words.astype(np.int32))))
    model = tiny.model()
    return train_dpo(config, model, tiny.init(model), pairs, workdir)


def gspo(layout: Layout, workdir: Path, steps: int) -> TrainResult:
    """With a reward of its own in each process: all must train on that of the first."""
    config = RLConfig(
        steps=steps, prompts_per_step=4, samples_per_prompt=4, updates_per_rollout=2, micro_batches=4,
        eps_low=0.2, eps_high=0.2, max_new_tokens=2, kl="k3", kl_coefficient=0.1, layout=layout, optimizer=OPTIMIZER,
        reward=RewardConfig(custom=("tests.train.several:reward",)),
    )  # fmt: skip
    model, params, processor = policy()
    return train_rl(config, model, params, letters(), processor, workdir)


def reward(trajectory: Trajectory, sample: Sample) -> dict[str, float]:
    return {"correct": float(sum(trajectory.segments[0].token_ids) % 2) * is_first()}


OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
JOBS = {"sft": sft, "dpo": dpo, "gspo": gspo}


def _kill_in_step(number: int) -> None:
    call, seen = TrainStep.__call__, 0

    def counted(self: TrainStep, *arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, *arguments)

    TrainStep.__call__ = counted  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    main(*sys.argv[1:])
