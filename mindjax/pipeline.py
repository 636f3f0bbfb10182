"""The whole post-training path as one job: three SFT stages, GSPO beside continued SFT, DPO, evaluation after each.

`experiments/quickstart.py` configures it. A stage leaves `<workdir>/stages/<stage>/` with its metrics, its model as an
HF folder and, written last, `result.json`; a run that is started again skips the stages that have one and goes on
inside the one that was interrupted. Everything is a function of the seed, so it makes no difference.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mindjax.config import ModelConfig
from mindjax.data import tasks
from mindjax.data.loader import RenderedSamples
from mindjax.data.packing import BatchShape, size_of
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered
from mindjax.data.samples import difficulty_levels, new_processor
from mindjax.dpo import train as dpo
from mindjax.evaluation import report
from mindjax.evaluation.compute import Compute
from mindjax.evaluation.run import Reply, accuracy, ask, render_prompts, write_replies
from mindjax.evaluation.statistics import blind_baseline
from mindjax.experiment import to_dataclass
from mindjax.inference.sampler import prompt_shape
from mindjax.models import hf_weights, qwen3_vl
from mindjax.rl import train as rl
from mindjax.rl.rollout import policy_shape
from mindjax.sft import train as sft
from mindjax.train.folder import export
from mindjax.train.loop import TrainResult
from mindjax.types import Sample

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Params = dict[str, Any]

STAGES = ("knowledge", "ability", "preference", "gspo", "continued", "dpo")
# Where each stage starts. GSPO and continued SFT are the two arms of one comparison.
PARENTS = {
    "knowledge": None, "ability": "knowledge", "preference": "ability",
    "gspo": "preference", "continued": "preference", "dpo": "gspo",
}  # fmt: skip
# Samples of different stages are drawn with different seeds; the held-out ones are the same for every run.
_HELD_OUT_SEED = 0


@dataclass(frozen=True)
class DataSizes:
    """How many items are drawn, each time per family.

    Attributes:
      knowledge, ability: of a stage's own families.
      replay: of the knowledge families in the ability stage.
      preference: of every family in the preference stage, in each form.
      explore: of the families where GSPO and continued SFT are compared.
      rehearse: of all others, and a quarter as many of every family in boxed form, that both arms see beside them.
      pairs: prompts from which DPO makes preference pairs, in each form.
      probe: fresh items of training sources that measure what the ability stage should blend.
      held_out: of held-out sources, for the accuracies.
      variants: held-out items of every other form (boxed, choice, without its image).
    """

    knowledge: int
    ability: int
    replay: int
    preference: int
    explore: int
    rehearse: int
    pairs: int
    probe: int
    held_out: int
    variants: int


@dataclass(frozen=True)
class PipelineConfig:
    """The job.

    Attributes:
      seed: of everything that is drawn: initial weights, items, order, samples.
      model: shapes; the vocabulary size bounds the tokenizer that is trained on the spot.
      max_pixels: of an image.
      knowledge, ability: families of `mindjax.data.tasks` that stage 1 and stage 2 train.
      explore: those of them where GSPO is compared with continued SFT.
      data: how many items of each.
      sft_knowledge, sft_ability, sft_preference, sft_continued: see `SFTConfig`; equal shapes share a compiled step.
      gspo: see `RLConfig`.
      dpo: see `DPOConfig`.
      levels: of difficulty, from easy to hard in the first epoch of an SFT stage; 1 mixes all.
      max_new_tokens: of an evaluated reply.
      eval_rows: replies that are generated side by side.
    """

    seed: int
    model: ModelConfig
    max_pixels: int
    knowledge: tuple[str, ...]
    ability: tuple[str, ...]
    explore: tuple[str, ...]
    data: DataSizes
    sft_knowledge: sft.SFTConfig
    sft_ability: sft.SFTConfig
    sft_preference: sft.SFTConfig
    sft_continued: sft.SFTConfig
    gspo: rl.RLConfig
    dpo: dpo.DPOConfig
    levels: int
    max_new_tokens: int
    eval_rows: int

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.knowledge, *self.ability)))


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs the job to its end and leaves the final model in `<workdir>/model`, the page in `<workdir>/report.html`.

    Raises:
      ValueError: the config is wrong.
      Interrupted: after Ctrl-C or SIGTERM, once the stage under way is saved.
    """
    settings = to_dataclass(PipelineConfig, {key: value for key, value in config.items() if key != "kind"})
    Pipeline(settings, Path(workdir)).run()


class Pipeline:
    """The job with its data, made when first needed.

    Args:
      config: see `PipelineConfig`.
      workdir: where everything goes.
    """

    def __init__(self, config: PipelineConfig, workdir: Path):
        self.config, self.workdir = config, workdir
        self.began = time.monotonic()

    def run(self) -> None:
        """Every stage in turn."""
        work: dict[str, Callable[[Params, Path], tuple[TrainResult, dict[str, Any]]]] = {
            "knowledge": self._knowledge,
            "ability": self._ability,
            "preference": self._preference,
            "gspo": self._gspo,
            "continued": self._continued,
            "dpo": self._dpo,
        }
        self._say(f"{self.size:,} parameters, {len(self.processor.tokenizer)} tokens in the vocabulary")
        for number, stage in enumerate(STAGES, 1):
            self._stage(f"[{number}/{len(STAGES)}]", stage, work[stage])
            report.write(self.workdir)
        self._export()
        self._say(f"report: {self.workdir / 'report.html'}   model: {self.workdir / 'model'}")

    # Model and data

    @cached_property
    def _opened(self) -> tuple[ModelConfig, Processor]:
        texts = [
            sample
            for family in (*self.config.families, "text_only")
            for variant in ("cloze", "choice", "boxed", "ablated")
            for sample in self._draw(family, 0, min(500, self.config.data.knowledge), variant)
        ]
        return new_processor(self.config.model, texts, self.config.max_pixels)

    @property
    def model(self) -> ModelConfig:
        return self._opened[0]

    @property
    def processor(self) -> Processor:
        return self._opened[1]

    @cached_property
    def size(self) -> int:
        """Numbers in the model."""
        return sum(leaf.size for leaf in jax.tree.leaves(qwen3_vl.abstract_params(self.model)))

    def _draw(self, family: str, stage: int, count: int, variant: tasks.Variant = "cloze") -> list[Sample]:
        """Training items; a stage has its own."""
        return tasks.build(family, "train", count, 100 * self.config.seed + stage, variant) if count else []

    @cached_property
    def held_out(self) -> dict[str, list[Sample]]:
        """The evaluated items: name of a set -> samples of held-out sources, the same whatever the seed."""
        data, families = self.config.data, (*self.config.families, "text_only")

        def draw(variant: tasks.Variant, count: int, names: Sequence[str] = families) -> list[Sample]:
            return [s for name in names for s in tasks.build(name, "test", count, _HELD_OUT_SEED, variant)]

        pictured = self.config.families
        return {
            "cloze": draw("cloze", data.held_out),
            "boxed": draw("boxed", data.variants),
            "choice": draw("choice", data.variants, pictured),
            "ablated": draw("ablated", data.variants, pictured),
        }

    @cached_property
    def _prompts(self) -> dict[str, list[Rendered]]:
        return {name: render_prompts(samples, self.processor) for name, samples in self.held_out.items()}

    @cached_property
    def _prompt_shape(self) -> BatchShape:
        """One shape for every evaluation, so that it is compiled once."""
        sizes = [size_of(prompt) for prompts in self._prompts.values() for prompt in prompts]
        return prompt_shape(sizes, self.config.eval_rows, self.model)

    @cached_property
    def baselines(self) -> dict[str, float]:
        """What a reply without looking reaches on the held-out items of each family."""
        return {
            family: blind_baseline(self._draw(family, 1, 400), [s for s in self.held_out["cloze"] if s.task == family])
            for family in (*self.config.families, "text_only")
        }

    # Stages

    def _knowledge(self, params: Params, folder: Path) -> tuple[TrainResult, dict[str, Any]]:
        """Perception from nothing."""
        data = self.config.data
        samples = [s for family in self.config.knowledge for s in self._draw(family, 1, data.knowledge)]
        return self._sft("knowledge", self.config.sft_knowledge, params, samples, folder)

    def _ability(self, params: Params, folder: Path) -> tuple[TrainResult, dict[str, Any]]:
        """New abilities, blended with replay: a family comes the more often, the worse it is answered now."""
        data = self.config.data
        counts = dict.fromkeys(self.config.knowledge, data.replay) | dict.fromkeys(self.config.ability, data.ability)
        probes = [s for family in counts for s in self._draw(family, 9, data.probe)]
        found = {task: interval.mean for task, interval in accuracy(self._ask(params, probes)).items()}
        # A floor keeps what is mastered from being forgotten.
        weights = {family: max(0.15, 1.0 - found[family]) for family in counts}
        samples = [s for family, count in counts.items() for s in self._draw(family, 2, count)]
        repeats = [weights[sample.task] for sample in samples]
        mean = float(np.mean(repeats))
        share = {f: weights[f] * counts[f] / sum(weights[g] * counts[g] for g in counts) for f in counts}
        result, notes = self._sft(
            "ability", self.config.sft_ability, params, samples, folder, repeats=[r / mean for r in repeats]
        )
        return result, {**notes, "probe": found, "blend": share}

    def _preference(self, params: Params, folder: Path) -> tuple[TrainResult, dict[str, Any]]:
        """Forms of answering: boxed, by letter, without a picture; text alone; and replay of the plain form."""
        count, samples = self.config.data.preference, []
        for family in self.config.families:
            for variant, share in (("cloze", 3), ("boxed", 2), ("choice", 1), ("ablated", 1)):
                samples += self._draw(family, 3, share * count, variant)  # type: ignore[arg-type]
        samples += self._draw("text_only", 3, 3 * count) + self._draw("text_only", 3, 2 * count, "boxed")
        return self._sft("preference", self.config.sft_preference, params, samples, folder)

    @cached_property
    def _explored(self) -> list[Sample]:
        """What both arms of the comparison see: the one the prompts and verdicts, the other the references."""
        data, families = self.config.data, (*self.config.families, "text_only")
        samples = [s for family in self.config.explore for s in self._draw(family, 4, data.explore)]
        for family in families:
            if family not in self.config.explore:
                samples += self._draw(family, 4, data.rehearse)
            samples += self._draw(family, 4, max(1, data.rehearse // 4), "boxed")
        return samples

    def _gspo(self, params: Params, folder: Path) -> tuple[TrainResult, dict[str, Any]]:
        config = replace(self.config.gspo, seed=self.config.seed)
        result = rl.train(config, self.model, params, self._explored, self.processor, folder, name="gspo")
        sizes = [size_of(prompt) for prompt in render_prompts(self._explored, self.processor)]
        policy = policy_shape(
            sizes,
            self.model,
            responses=config.responses_per_update // config.micro_batches,
            samples=config.samples_per_prompt,
            per_row=config.responses_per_row,
            max_new_tokens=config.max_new_tokens,
        )
        step = Compute(self.model).gspo_step(
            sizes,
            policy,
            prompts_per_step=config.prompts_per_step,
            samples_per_prompt=config.samples_per_prompt,
            updates=config.updates_per_rollout,
            micro_batches=config.micro_batches,
            new_tokens=config.max_new_tokens,
        )
        return result, {"prompts": len(self._explored), "flops": result.steps * step}

    def _continued(self, params: Params, folder: Path) -> tuple[TrainResult, dict[str, Any]]:
        # In no order of difficulty, as GSPO's prompts: the arms differ in how they learn alone.
        return self._sft("continued", self.config.sft_continued, params, self._explored, folder, difficulty=None)

    def _dpo(self, params: Params, folder: Path) -> tuple[TrainResult, dict[str, Any]]:
        """Pairs from the model's own replies: a right one, or the reference, against a wrong one."""
        samples = [
            s
            for family in (*self.config.families, "text_only")
            for variant in ("preference", "ablated_preference")
            if variant == "preference" or family != "text_only"  # which has no picture to take away
            for s in self._draw(family, 5, self.config.data.pairs, variant)
        ]
        replies = self._ask(params, samples, temperature=1.0)
        own = {reply.id: reply.text for reply in replies if not reply.right and reply.text}
        pairs = [replace(sample, rejected=own.get(sample.id, sample.rejected)) for sample in samples]
        rendered = [dpo.render_pair(sample, self.processor) for sample in pairs]
        config = replace(self.config.dpo, seed=self.config.seed)
        result = dpo.train(config, self.model, params, rendered, folder)
        return result, {"pairs": len(pairs), "pairs_from_own_mistakes": len(own)}

    def _sft(
        self, name: str, config: sft.SFTConfig, params: Params, samples: Sequence[Sample], folder: Path, **options: Any
    ) -> tuple[TrainResult, dict[str, Any]]:
        config = replace(config, seed=self.config.seed)
        # All of a stage's samples stay rendered: drawing one again takes as long as training on it.
        rendered = RenderedSamples(samples, self.processor, cache_bytes=2 << 30)
        shape = sft.choose_shape(config, self.model, rendered)
        options = {"difficulty": difficulty_levels(samples, self.config.levels), **options}
        result = sft.train(config, self.model, params, rendered, folder, name=name, shape=shape, **options)
        step = Compute(self.model).sft_step(shape, micro_batches=config.micro_batches)
        return result, {"samples": len(samples), "flops": result.steps * step}

    # Around a stage

    def _stage(self, place: str, name: str, work: Callable[[Params, Path], tuple[TrainResult, dict[str, Any]]]) -> None:
        """Runs, evaluates and records one stage, unless that was done before."""
        folder = self.workdir / "stages" / name
        if (folder / "result.json").exists():
            self._say(f"{place} {name}: finished before")
            return
        self._say(f"{place} {name}")
        resumed = folder.exists()
        parent = PARENTS[name]
        params = self._initial() if parent is None else self._load(parent)
        began = time.monotonic()
        result, notes = work(params, folder)
        trained = time.monotonic()
        evaluation = self._evaluate(result.params, name)
        export(folder / "model", self.model, result.params, self.processor)
        ended = time.monotonic()
        record = {
            "steps": result.steps,
            "metrics": result.metrics,
            "train_seconds": trained - began,
            "evaluation_seconds": ended - trained,
            "peak_memory": _peak_memory(),
            "resumed": resumed,
            **notes,
            "accuracy": evaluation,
        }
        _write_json(folder / "result.json", record)
        self._summary()
        self._tell(name)

    def _initial(self) -> Params:
        return qwen3_vl.init(self.model, jax.random.key(self.config.seed))

    def _load(self, stage: str) -> Params:
        return hf_weights.load(self.workdir / "stages" / stage / "model", self.model, dtype="float32")

    def _ask(self, params: Params, samples: Sequence[Sample], **options: Any) -> list[Reply]:
        return ask(
            params,
            self.model,
            self.processor,
            samples,
            max_new_tokens=self.config.max_new_tokens,
            seed=self.config.seed,
            shape=self._prompt_shape,
            **options,
        )

    def _evaluate(self, params: Params, stage: str) -> dict[str, dict[str, dict[str, float]]]:
        """Replies to every held-out set, written down verbatim; accuracies per set and family."""
        result = {}
        for name, samples in self.held_out.items():
            for suffix, temperature in (("", 0.0), ("_sampled", 1.0)):
                if suffix and name != "cloze":
                    continue
                replies = self._ask(params, samples, prompts=self._prompts[name], temperature=temperature)
                write_replies(self.workdir / "replies" / stage / f"{name}{suffix}.jsonl", replies)
                result[name + suffix] = accuracy(replies)
        return {
            name: {task: asdict(interval) for task, interval in by_task.items()} for name, by_task in result.items()
        }

    def _summary(self) -> None:
        """What the report reads besides the stages' own files."""
        examples = self.workdir / "examples"
        if not examples.exists():
            report.save_examples(examples, self.held_out["cloze"])
        _write_json(
            self.workdir / "summary.json",
            {
                "seed": self.config.seed,
                "parameters": self.size,
                "vocabulary": len(self.processor.tokenizer),
                "model": asdict(self.model),
                "families": {
                    family: report.DESCRIPTIONS.get(family, "") for family in (*self.config.families, "text_only")
                },
                "knowledge": self.config.knowledge,
                "ability": self.config.ability,
                "explore": self.config.explore,
                "eps": (self.config.gspo.eps_low, self.config.gspo.eps_high),
                "baselines": self.baselines,
                "stages": STAGES,
                "parents": PARENTS,
            },
        )

    def _tell(self, stage: str) -> None:
        """The accuracies so far, on the terminal."""
        print(report.text_table(self.workdir), file=sys.stderr, flush=True)

    def _export(self) -> None:
        export(self.workdir / "model", self.model, self._load("dpo"), self.processor)

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {text}", file=sys.stderr, flush=True)


def _peak_memory() -> int:
    """Bytes that this process held at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(draft, path)
