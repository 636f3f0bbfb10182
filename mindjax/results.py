"""What each part of the RL stage does: runs that differ in one thing, from one SFT checkpoint, compared with intervals.

`experiments/results.py` configures it. An arm is a difference from one base recipe, run once for each seed. A run
leaves `<workdir>/runs/<arm>-<seed>/` with its metrics, its replies to held-out items and, written last, `result.json`;
a job that is started again skips the runs that have one and goes on inside those that were interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from mindjax.allocator import keep_freed_memory
from mindjax.config import ModelConfig
from mindjax.data import tasks
from mindjax.data.loader import RenderedSamples
from mindjax.data.packing import BatchShape, size_of
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered
from mindjax.data.samples import new_processor
from mindjax.dpo import train as dpo
from mindjax.evaluation import draws, results_page, rollouts
from mindjax.evaluation.draws import Reply
from mindjax.evaluation.results_page import Column
from mindjax.evaluation.run import render_prompts
from mindjax.experiment import to_dataclass
from mindjax.inference.sampler import SamplingConfig, prompt_shape
from mindjax.models import qwen3_vl
from mindjax.rl import train as rl
from mindjax.rl.config import RLConfig
from mindjax.sft import train as sft
from mindjax.train.folder import export, open_model
from mindjax.types import Sample
from mindjax.workers import side_by_side

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Params = dict[str, Any]
Job = tuple[str, int]  # an arm and a seed

START = "start"  # the model that all arms start from
ASK_TO_THINK = "Think first."
THOUGHT = "Let me look again. "
# Of the keys: training items are drawn anew for each purpose, held-out ones are the same for all.
_SFT, _RL, _DPO, _HELD_OUT = 1, 2, 3, 0


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
      name: in file names and comparisons.
      title: in tables.
      changes: fields of the base recipe that are different, nested as `RLConfig` is.
      prompts: "plain" questions, or those that ask to "think" first.
      after: the arm whose final model DPO starts from; "" is GSPO from the SFT checkpoint.
    """

    name: str
    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    prompts: Literal["plain", "think"] = "plain"
    after: str = ""


@dataclass(frozen=True)
class Comparison:
    """A section of the page.

    Attributes:
      name: in file names, and of its section in the analysis.
      title, question: what is compared, and what should come out.
      arms: the first is the one that the others are compared with.
      columns: of the table.
      curves: metrics of the runs that are drawn over the steps.
    """

    name: str
    title: str
    question: str
    arms: tuple[str, ...]
    columns: tuple[Column, ...]
    curves: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSizes:
    """How many items are drawn, each time per family.

    Attributes:
      plain, think, ablated: for SFT: plain questions, those that ask to think, those without their picture.
      prompts: for RL.
      pairs: for DPO, half of them without their picture.
      held_out: evaluated, of held-out sources.
    """

    plain: int
    think: int
    ablated: int
    prompts: int
    pairs: int
    held_out: int


@dataclass(frozen=True)
class ResultsConfig:
    """The job.

    Attributes:
      seeds: of the runs: the order of prompts and what is sampled. The SFT checkpoint is one for all.
      workers: processes that run side by side, on a core each; 1 runs all in this one.
      model: shapes; the vocabulary size bounds the tokenizer that is trained on the spot.
      max_pixels: of an image.
      families: of `mindjax.data.tasks`, with one right reply.
      several: families with several right replies.
      data: how many items of each.
      samples: replies to a held-out item at temperature 1.
      max_new_tokens: of an evaluated reply to a plain question; of the others as many as in the arm's training.
      sft: the shared first stage.
      base: the recipe that arms change.
      dpo: of the arms that have it.
      arms: each with a name of its own.
      comparisons: in the order of the page.
      analysis: a Markdown file with a section `## name` for each comparison, read when the page is made.
      publish: a folder that the page is copied to, with its pictures in `images`; "" leaves it in the run directory.
    """

    seeds: tuple[int, ...]
    workers: int
    model: ModelConfig
    max_pixels: int
    families: tuple[str, ...]
    several: tuple[str, ...]
    data: DataSizes
    samples: int
    max_new_tokens: int
    sft: sft.SFTConfig
    base: RLConfig
    dpo: dpo.DPOConfig
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    analysis: str = ""
    publish: str = ""

    def __post_init__(self) -> None:
        if not self.seeds or self.workers < 1:
            raise ValueError("results: at least one seed and one worker are needed")
        names = [arm.name for arm in self.arms]
        if len({*names, START}) <= len(names):
            raise ValueError(f"results: arms need names of their own, and none is {START!r}; they are {names}")
        for comparison in self.comparisons:
            if len(comparison.arms) < 2 or not {*comparison.arms} <= {*names, START}:
                raise ValueError(
                    f"results: comparison {comparison.name!r} needs two arms or more out of {names} and {START!r}; "
                    f"it has {list(comparison.arms)}"
                )
        for arm in self.arms:
            if not arm.after:
                self.recipe(arm.name)
            elif arm.after not in names or self.arm(arm.after).after:
                raise ValueError(f"results: arm {arm.name!r} cannot come after {arm.after!r}: name an arm of GSPO")

    @property
    def all_families(self) -> tuple[str, ...]:
        return (*self.families, *self.several)

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def recipe(self, arm: str) -> RLConfig:
        """The base with the arm's changes.

        Raises:
          ValueError: a change of something that is not there, or one that the recipe refuses.
        """
        try:
            return to_dataclass(RLConfig, _changed(asdict(self.base), self.arm(arm).changes))
        except ValueError as error:
            raise ValueError(f"results: arm {arm!r}: {error}") from None


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        result[key] = _changed(base[key], value) if nested else value
    return result


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs the job to its end and leaves `results.md` and `report.html` in `workdir`.

    Raises:
      ValueError: the config is wrong.
      Interrupted: after Ctrl-C or SIGTERM, once what is under way is saved.
      RuntimeError: a run in a process of its own failed; the message holds its error.
    """
    settings = to_dataclass(ResultsConfig, {key: value for key, value in config.items() if key != "kind"})
    Results(settings, Path(workdir)).run()


class Results:
    """The job with its data, made when first needed.

    Args:
      config: see `ResultsConfig`.
      workdir: where everything goes.
    """

    def __init__(self, config: ResultsConfig, workdir: Path):
        self.config, self.workdir = config, workdir
        self.began = time.monotonic()

    def run(self) -> None:
        self._start()
        names = [(arm.name, seed) for seed in self.config.seeds for arm in self.config.arms]
        jobs = [job for job in names if not self._finished(job)]
        if len(jobs) < len(names):
            self._say(f"{len(names) - len(jobs)} of {len(names)} runs finished before")
        # What DPO starts from comes first.
        waves = [[job for job in jobs if bool(self.config.arm(job[0]).after) == later] for later in (False, True)]
        done = len(names) - len(jobs)
        for wave in waves:
            for job in self._work(wave):
                done += 1
                self._say(f"[{done}/{len(names)}] {self._told(job)}")
        results_page.write(self.workdir, self.config.analysis, self.config.publish)
        self._say(f"report: {self.workdir / 'report.html'}   table: {self.workdir / 'results.md'}")

    def _work(self, jobs: Sequence[Job]) -> Iterator[Job]:
        if self.config.workers == 1 or len(jobs) < 2:
            for job in jobs:
                self.one(job)
                yield job
        else:
            yield from side_by_side(jobs, partial(_one, self.config, self.workdir), self.config.workers)

    # The model that all start from

    @cached_property
    def _opened(self) -> tuple[ModelConfig, Params, Processor]:
        return open_model(str(self.workdir / START / "model"), ())

    @property
    def model(self) -> ModelConfig:
        return self._opened[0]

    @property
    def processor(self) -> Processor:
        return self._opened[2]

    def _start(self) -> None:
        """The SFT stage, and the files that the page reads besides the runs'."""
        folder = self.workdir / START
        _write_json(self.workdir / "summary.json", _summary(self.config))
        if (folder / "result.json").exists():
            return
        self._say("SFT: the model that all runs start from")
        began, config, resumed = time.monotonic(), self.config, (folder / "checkpoints").exists()
        samples = self._demonstrations()
        model, processor = new_processor(config.model, samples, config.max_pixels)
        params = qwen3_vl.init(model, jax.random.key(0))
        rendered = RenderedSamples(samples, processor, cache_bytes=2 << 30)
        result = sft.train(config.sft, model, params, rendered, folder, name="sft")
        export(folder / "model", model, result.params, processor)
        trained = time.monotonic()
        self._examine(result.params, folder / "end.jsonl", ("plain", "ablated", "think"), self._most_tokens)
        _write_json(
            folder / "result.json",
            {
                "steps": result.steps, "samples": len(samples), "train_seconds": trained - began, "resumed": resumed,
                "evaluation_seconds": time.monotonic() - trained,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(result.params)),
            },
        )  # fmt: skip
        self._say(self._told((START, 0)))

    def _demonstrations(self) -> list[Sample]:
        """Plain replies; wordy ones that often go in circles; and questions whose picture got lost.

        Of the last, half are answered as if it were there, as in data that nobody looked through: the model learns
        both to say that there is none and to invent.
        """
        data, samples = self.config.data, []
        rng = np.random.default_rng(_SFT)
        for family in self.config.all_families:
            samples += tasks.build(family, "train", data.plain, _SFT)
            samples += [thoughtful(s, rng) for s in tasks.build(family, "train", data.think, _SFT + 100)]
            for i, sample in enumerate(tasks.build(family, "train", data.ablated, _SFT, "ablated_preference")):
                invented = {"role": "assistant", "content": sample.rejected}
                messages = (*sample.messages[:-1], invented) if i % 2 else sample.messages
                samples.append(replace(sample, messages=messages, rejected=None))
        return samples

    # One run

    def one(self, job: Job) -> None:
        """Trains, evaluates and records one run."""
        arm, seed = job
        spec, folder = self.config.arm(arm), self.folder(job)
        resumed = (folder / "checkpoints").exists()
        began = time.monotonic()
        train = self._dpo if spec.after else self._gspo
        params, tokens, notes = train(arm, seed, folder)
        trained = time.monotonic()
        self._examine(params, folder / "end.jsonl", _sets(spec), tokens)
        export(folder / "model", self.model, params, self.processor)
        if not spec.after:
            rollouts.write(folder)
        record = {"arm": arm, "seed": seed, "train_seconds": trained - began, "resumed": resumed, **notes}
        _write_json(folder / "result.json", {**record, "evaluation_seconds": time.monotonic() - trained})

    def _gspo(self, arm: str, seed: int, folder: Path) -> tuple[Params, int, dict[str, Any]]:
        spec = self.config.arm(arm)
        # The middle is where a first phase of half the steps ends.
        middle = self.config.recipe(arm).steps // 2
        config = replace(self.config.recipe(arm), seed=seed, evaluate_every=middle)

        def evaluate(params: Params) -> dict[str, float]:
            if not (folder / "middle.jsonl").exists():
                self._examine(params, folder / "middle.jsonl", _sets(spec)[:1], config.max_new_tokens)
            return {}

        result = rl.train(
            config, self.model, self._opened[1], self._prompts[spec.prompts], self.processor, folder,
            name=f"{arm}-{seed}", evaluate=evaluate,
        )  # fmt: skip
        return result.params, config.max_new_tokens, {"steps": result.steps}

    def _dpo(self, arm: str, seed: int, folder: Path) -> tuple[Params, int, dict[str, Any]]:
        """The model's own wrong replies against the reference; invented ones against saying that nothing is there."""
        first = self.config.arm(arm).after
        _, params, _ = open_model(str(self.folder((first, seed)) / "model"), ())
        samples = []
        for family in self.config.all_families:
            samples += tasks.build(family, "train", self.config.data.pairs // 2, _DPO)
            samples += tasks.build(family, "train", self.config.data.pairs // 2, _DPO, "ablated")
        pairs = []
        for sample, replies in zip(samples, self._replies(params, samples, self.config.samples, seed), strict=True):
            wrong = [reply.text for reply in replies if reply.text and not reply.right]
            if wrong:
                pairs.append(dpo.render_pair(replace(sample, rejected=wrong[0]), self.processor))
        config = replace(self.config.dpo, seed=seed)
        result = dpo.train(config, self.model, params, pairs, folder, name=f"{arm}-{seed}")
        return result.params, self.config.max_new_tokens, {"steps": result.steps, "pairs": len(pairs)}

    @cached_property
    def _prompts(self) -> dict[str, list[Sample]]:
        count, families = self.config.data.prompts, self.config.all_families
        plain = [s for family in families for s in tasks.build(family, "train", count, _RL)]
        rng = np.random.default_rng(_RL)
        return {"plain": plain, "think": [thoughtful(sample, rng) for sample in plain]}

    # Held-out items

    @cached_property
    def held_out(self) -> dict[str, list[Sample]]:
        """The evaluated items by set; the same whatever the run, and "ablated" the twins of "plain"."""
        count, rng = self.config.data.held_out, np.random.default_rng(_HELD_OUT)
        families = self.config.all_families
        plain = [s for family in families for s in tasks.build(family, "test", count, _HELD_OUT)]
        return {
            "plain": plain,
            "ablated": [without_picture(sample) for sample in plain],
            "think": [thoughtful(sample, rng) for sample in plain],
        }

    @cached_property
    def _rendered(self) -> dict[str, list[Rendered]]:
        return {name: render_prompts(samples, self.processor) for name, samples in self.held_out.items()}

    @cached_property
    def _shape(self) -> BatchShape:
        """One shape for every evaluation, so that it is compiled once."""
        sizes = [size_of(prompt) for prompts in self._rendered.values() for prompt in prompts]
        return prompt_shape(sizes, self.config.base.prompts_per_step, self.model)

    @property
    def _most_tokens(self) -> int:
        return max(self.config.recipe(arm.name).max_new_tokens for arm in self.config.arms if not arm.after)

    def _replies(self, params: Params, samples: Sequence[Sample], count: int, seed: int) -> list[list[Reply]]:
        """Some replies at temperature 1 to each sample."""
        sampling = SamplingConfig(self.config.max_new_tokens, num_samples=count)
        prompts = render_prompts(samples, self.processor)
        return draws.draw(params, self.model, self.processor, samples, prompts, sampling, seed=seed, shape=self._shape)

    def _examine(self, params: Params, path: Path, sets: Sequence[str], tokens: int) -> None:
        """Asks every held-out item of the sets and writes what came; `tokens` bound the replies with thought."""
        records = []
        for name in sets:
            most = tokens if name == "think" else self.config.max_new_tokens
            sampling = SamplingConfig(most, num_samples=self.config.samples)
            items, prompts = self.held_out[name], self._rendered[name]
            found = draws.examine(params, self.model, self.processor, items, prompts, sampling, shape=self._shape)
            records += [{"set": name, **record} for record in found]
        draws.write(path, records)

    # Around a run

    def folder(self, job: Job) -> Path:
        """Of a run."""
        return self.workdir / "runs" / f"{job[0]}-{job[1]}"

    def _finished(self, job: Job) -> bool:
        return (self.folder(job) / "result.json").exists()

    def _told(self, job: Job) -> str:
        folder = self.workdir / START if job[0] == START else self.folder(job)
        result = json.loads((folder / "result.json").read_text())
        means = results_page.means(folder, "greedy")
        shown = "  ".join(f"{family} {value:.0%}" for family, value in means.items())
        return f"{folder.name}: {result['train_seconds']:.0f} + {result['evaluation_seconds']:.0f} s  {shown}"

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {text}", file=sys.stderr, flush=True)


def _sets(arm: Arm) -> tuple[str, ...]:
    return ("think",) if arm.prompts == "think" else ("plain", "ablated")


def thoughtful(sample: Sample, rng: np.random.Generator) -> Sample:
    """The question with a wish to think first, the reply in a box after some thought.

    The thought adds nothing and repeats itself: not at all, one to four times, or twelve times, which no longer fits
    what RL lets a reply have. So there is something to shorten, and there are circles to be cut.
    """
    *parts, last = sample.messages[0]["content"]
    question = {**sample.messages[0], "content": [*parts, {**last, "text": f"{last['text']} {ASK_TO_THINK}"}]}
    times = int(rng.choice((0, 1, 2, 3, 4, 12), p=(0.2, 0.125, 0.125, 0.125, 0.125, 0.3)))
    reply = {"role": "assistant", "content": THOUGHT * times + tasks.boxed(str(sample.messages[-1]["content"]))}
    return replace(sample, messages=(question, reply), id=f"{sample.id}/think")


def without_picture(sample: Sample) -> Sample:
    """The same question with nothing to look at; right is to say so."""
    text = [part for part in sample.messages[0]["content"] if part["type"] == "text"]
    messages = ({**sample.messages[0], "content": text}, {"role": "assistant", "content": tasks.NO_IMAGE})
    answer = {"kind": "exact", "value": tasks.NO_IMAGE.rstrip(".")}
    return replace(sample, messages=messages, id=f"{sample.id}/ablated", answer=answer)


def _one(config: ResultsConfig, workdir: Path) -> Callable[[Job], None]:
    """What a worker process does with a job; its output goes to the run's `log.txt`."""
    keep_freed_memory()
    results = Results(config, workdir)

    def run_logged(job: Job) -> None:
        path = results.folder(job) / "log.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
            results.one(job)

    return run_logged


def _summary(config: ResultsConfig) -> dict[str, Any]:
    """What the page reads besides the runs' own files."""
    return {
        "seeds": config.seeds,
        "samples": config.samples,
        "held_out": config.data.held_out,
        "families": config.families,
        "several": config.several,
        "workers": config.workers,
        "cores": os.cpu_count(),
        "base": asdict(config.base),
        "arms": {arm.name: {"title": arm.title, "changes": arm.changes} for arm in config.arms},
        "comparisons": {comparison.name: asdict(comparison) for comparison in config.comparisons},
    }


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(draft, path)
