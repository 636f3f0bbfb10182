"""Runs of the loop in a process of its own: `python -m tests.rl.program WORKDIR [--kill-at STEP] [--devices N ...]`.

With devices there is a run for each number of them, in `WORKDIR/N`.
"""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindjax.losses.off_policy import OffPolicyConfig
from mindjax.rl.config import AdvantageConfig, OversampleConfig, RLConfig, RolloutConfig, frozen_vision
from mindjax.rl.train import train
from tests.rl import tiny

# Overlapped, in two phases that the entropy may end, oversampled: whatever a checkpoint has to remember.
SETTINGS = RLConfig(
    steps=5, prompts_per_step=4, samples_per_prompt=4, updates_per_rollout=2, eps_low=0.2, eps_high=0.2,
    max_new_tokens=1, optimizer=replace(frozen_vision(), learning_rate=3e-3), checkpoint_every=2, evaluate_every=1,
    advantage=AdvantageConfig(pass_at_k=0.8, k=2), off_policy=OffPolicyConfig("sequence"),
    rollout=RolloutConfig(overlap=True), oversample=OversampleConfig(largest=2.0),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--devices", type=int, nargs="*")
    arguments = parser.parse_args()
    steps = 0

    def evaluate(_: Any) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps == arguments.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    config, params, processor = tiny.policy()
    runs = [(0, Path(arguments.workdir))]
    if arguments.devices:
        runs = [(number, Path(arguments.workdir) / str(number)) for number in arguments.devices]
    for devices, workdir in runs:
        settings = replace(SETTINGS, rollout=replace(SETTINGS.rollout, devices=devices))
        train(settings, config, params, tiny.letters(), processor, workdir, evaluate=evaluate)


if __name__ == "__main__":
    main()
