"""MGPO as one job: a shared warm-up by SFT, then GSPO from it in every arm and seed, and their comparison.

`experiments/mgpo.py` configures it. `<workdir>/sft` holds the warm-up, `<workdir>/<arm>-<seed>` a run, each with a
`result.json` once it is done; what is done is skipped when the job is started again, what was interrupted goes on.
`<workdir>/mgpo.json` and `<workdir>/mgpo.txt` compare the arms. The gain of RL stands apart from that of the warm-up,
which teaches the form of a box and to read; the arms share it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mindjax.config import ModelConfig
from mindjax.data import tasks
from mindjax.data.loader import RenderedSamples
from mindjax.data.processor import Processor
from mindjax.data.samples import new_processor
from mindjax.data.tasks.verify import is_right
from mindjax.evaluation.statistics import paired_bootstrap
from mindjax.experiment import to_dataclass
from mindjax.inference.generate import stop_token_ids
from mindjax.inference.sampler import SamplingConfig
from mindjax.models import hf_weights, qwen3_vl
from mindjax.rl import train as rl
from mindjax.rl.config import RLConfig, RolloutConfig
from mindjax.rl.crop_tool import View
from mindjax.rl.engine import NativeEngine
from mindjax.rl.environments import Environment, play
from mindjax.rl.mgpo import Arm, InvalidCall, Looking, LookOnce, demonstration, parse_box
from mindjax.sft import train as sft
from mindjax.train.folder import export
from mindjax.types import Sample, Trajectory

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Params = dict[str, Any]
FAMILY = "digit_canvas"


@dataclass(frozen=True)
class MGPOConfig:
    """The job.

    Attributes:
      seed: of the warm-up: initial weights, data, order.
      seeds: of the runs: prompts, their order, samples. Every arm has the same ones.
      arms: which to compare, see `mindjax.rl.mgpo.Arm`.
      model: shapes of the model.
      looking: what is shown, and how large.
      spread: pixels of the original by which demonstrated boxes are off at most.
      demonstrations, alone, close: conversations of the warm-up: in two turns; in one, on the whole picture; in one, on
        a crop about the answer, which alone teach this small a model to read.
      prompts: of a run.
      held_out: items that every arm answers, greedily, before and after.
      sft: the warm-up, see `SFTConfig`.
      rl: a run, see `RLConfig`; its seed is replaced.
    """

    seed: int
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    model: ModelConfig
    looking: Looking
    spread: float
    demonstrations: int
    alone: int
    close: int
    prompts: int
    held_out: int
    sft: sft.SFTConfig
    rl: RLConfig


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs what is not done yet and prints the comparison.

    Raises:
      ValueError: the config is wrong.
      Interrupted: after Ctrl-C or SIGTERM, once the run under way is saved.
    """
    settings = to_dataclass(MGPOConfig, {key: value for key, value in config.items() if key != "kind"})
    MGPO(settings, Path(workdir)).run()


class MGPO:
    """The job with its data, made when first needed.

    Args:
      config: see `MGPOConfig`.
      workdir: where everything goes.
    """

    def __init__(self, config: MGPOConfig, workdir: Path):
        self.config, self.workdir, self.began = config, workdir, time.monotonic()

    def run(self) -> None:
        self._warm_up()
        for seed in self.config.seeds:
            for arm in self.config.arms:
                self._arm(arm, seed)
        table = compare(self.workdir, self.config.arms, self.config.seeds)
        print(table)

    # Data and model

    def _items(self, split: tasks.Split, count: int, seed: int) -> list[Sample]:
        return tasks.build(FAMILY, split, count, seed)

    @cached_property
    def _demonstrations(self) -> list[Sample]:
        """Those of two turns, and those of one."""
        config, rng = self.config, np.random.default_rng((self.config.seed, 1))
        count = config.demonstrations + config.close
        items = self._items("train", count + config.alone, 100 * config.seed + 1)
        two = [demonstration(s, config.looking, rng, config.spread) for s in items[:count]]
        close = [replace(s, messages=s.messages[2:]) for s in two[config.demonstrations :]]
        env = LookOnce(config.looking, "alone", rng)
        alone = [replace(s, messages=(*map(dict, env.reset(s)), s.messages[-1])) for s in items[count:]]
        return two[: config.demonstrations] + close + alone

    @cached_property
    def _held_out(self) -> list[Sample]:
        return self._items("test", self.config.held_out, 0)

    @cached_property
    def _opened(self) -> tuple[ModelConfig, Processor]:
        looking = self.config.looking
        tokens = looking.whole_tokens + looking.crop_tokens
        return new_processor(self.config.model, self._demonstrations, tokens * looking.token_side**2)

    def _environment(self, arm: Arm) -> Environment:
        return self.config.looking.environment(arm, self._opened[1], tasks.canvas.QUESTION)

    def _load(self, name: str) -> Params:
        return hf_weights.load(self.workdir / name / "model", self._opened[0], dtype="float32")

    # The parts of the job

    def _warm_up(self) -> None:
        folder = self.workdir / "sft"
        if (folder / "result.json").exists():
            self._say("warm-up: finished before")
            return
        model, processor = self._opened
        rendered = RenderedSamples(self._demonstrations, processor)
        params = qwen3_vl.init(model, jax.random.key(self.config.seed))
        result = sft.train(replace(self.config.sft, seed=self.config.seed), model, params, rendered, folder)
        export(folder / "model", model, result.params, processor)
        arms = {arm: self._evaluate(result.params, arm) for arm in self.config.arms}
        write_json(folder / "result.json", {"steps": result.steps, "seconds": result.seconds, "arms": arms})
        shown = ", ".join(f"{arm} {np.mean(found['right']):.1%}" for arm, found in arms.items())
        self._say(f"warm-up: {shown}")

    def _arm(self, arm: Arm, seed: int) -> None:
        name = f"{arm}-{seed}"
        folder = self.workdir / name
        if (folder / "result.json").exists():
            self._say(f"{name}: finished before")
            return
        model, processor = self._opened
        samples = self._items("train", self.config.prompts, 1000 + seed)
        result = rl.train(
            replace(self.config.rl, seed=seed), model, self._load("sft"), samples, processor, folder,
            name=name, environment=self._environment(arm),
        )  # fmt: skip
        export(folder / "model", model, result.params, processor)
        found = self._evaluate(result.params, arm)
        write_json(
            folder / "result.json",
            {"steps": result.steps, "seconds": result.seconds, "metrics": result.metrics, **found},
        )
        self._say(f"{name}: {np.mean(found['right']):.1%} of held-out items right")

    def _evaluate(self, params: Params, arm: Arm) -> dict[str, Any]:
        """Greedy answers to the held-out items: verdicts, texts of both turns, and how many crops show the card."""
        model, processor = self._opened
        environment = self._environment(arm)
        prompts = [environment.prompt(i, sample, processor) for i, sample in enumerate(self._held_out)]
        stop = stop_token_ids(processor)
        sampling = SamplingConfig(self.config.rl.max_new_tokens, temperature=0.0, stop_token_ids=stop)
        engine = NativeEngine(model, RolloutConfig(), {})
        engine.update(params, 0)
        played = play(engine, prompts, sampling, 0, 0, environment=environment, processor=processor)
        engine.close()
        trajectories = [row[0] for row in played]
        right = [float(is_right(s.answer or {}, t.text)) for t, s in zip(trajectories, self._held_out, strict=True)]
        found: dict[str, Any] = {
            "right": right,
            "invalid": float(np.mean(["invalid" in t.flags for t in trajectories])),
        }
        if arm == "learned":
            pairs = zip(trajectories, self._held_out, strict=True)
            found["on_card"] = float(np.mean([self._on_card(t, s) for t, s in pairs]))
        found["said"] = [[s.text for s in t.segments if s.author == "policy"] for t in trajectories]
        return found

    def _on_card(self, trajectory: Trajectory, sample: Sample) -> bool:
        """Whether the policy's box holds the middle of the card."""
        env = LookOnce(self.config.looking, "learned", np.random.default_rng(0))
        env.reset(sample)
        view, size = env.state["views"][0], env.state["original"].shape[:2]
        assert isinstance(view, View) and env.box is not None
        try:
            box = parse_box(trajectory.segments[0].text)
            left, top, right, bottom = self.config.looking.rules.region(box, "shown", view, size)
        except InvalidCall:
            return False
        x, y = (env.box[0] + env.box[2]) / 2, (env.box[1] + env.box[3]) / 2
        return left <= x <= right and top <= y <= bottom

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {text}", file=sys.stderr, flush=True)


def compare(workdir: Path, arms: Sequence[str], seeds: Sequence[int]) -> str:
    """Writes `mgpo.json` and `mgpo.txt`: accuracies before and after RL, and the first arm less each other one.

    Returns:
      The text.
    """
    before = json.loads((workdir / "sft" / "result.json").read_text())["arms"]
    found = {
        arm: [json.loads((workdir / f"{arm}-{seed}" / "result.json").read_text()) for seed in seeds] for arm in arms
    }
    right = {arm: [result["right"] for result in results] for arm, results in found.items()}
    lines = [f"{'arm':8}  {'warm-up':>8}  {'after RL, by seed':24}  {'mean':>6}  gain of RL [95 %]"]
    record: dict[str, Any] = {}
    for arm in arms:
        start = before[arm]["right"]
        gain = paired_bootstrap(right[arm], [start] * len(seeds))
        by_seed = [float(np.mean(r)) for r in right[arm]]
        record[arm] = {"before": float(np.mean(start)), "after": by_seed, "gain": asdict(gain)}
        if "on_card" in before[arm]:
            record[arm] |= {"on_card": [before[arm]["on_card"], [result["on_card"] for result in found[arm]]]}
        shown = "  ".join(f"{share:6.1%}" for share in by_seed)
        lines.append(f"{arm:8}  {np.mean(start):8.1%}  {shown:24}  {np.mean(by_seed):6.1%}  {gain:+.1%}")
    for other in arms[1:]:
        difference = paired_bootstrap(right[arms[0]], right[other])
        record[f"{arms[0]} - {other}"] = asdict(difference)
        lines.append(f"{arms[0]} - {other}: {difference:+.1%}")
    if "on_card" in record[arms[0]]:
        first, after = record[arms[0]]["on_card"]
        lines.append(f"boxes on the card: {first:.1%} before, {', '.join(f'{share:.1%}' for share in after)} after RL")
    seconds = [result["seconds"] for results in found.values() for result in results]
    lines.append(f"seconds of RL per run: {min(seconds):.0f} to {max(seconds):.0f}")
    table = "\n".join(lines)
    write_json(workdir / "mgpo.json", record)
    (workdir / "mgpo.txt").write_text(table + "\n")
    return table


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(draft, path)
