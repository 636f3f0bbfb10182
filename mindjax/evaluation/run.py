"""Asking a model held-out questions and judging its replies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindjax.config import ModelConfig
from mindjax.data.packing import BatchShape
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered, render
from mindjax.data.samples import DataConfig
from mindjax.data.tasks.verify import is_right
from mindjax.data.tasks.worker import Worker
from mindjax.evaluation.statistics import Interval, blind_baseline, wilson
from mindjax.experiment import to_dataclass
from mindjax.inference.sampler import SamplingConfig, generate, sampling_keys
from mindjax.types import Sample

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Params = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What a model said to one item, verbatim, and the verdict.

    Attributes:
      id, task: of the sample.
      text: as decoded, nothing trimmed.
      right: whether the sample's verifier accepts it.
      tokens: generated, the stop token included.
      finish_reason: "stop" or "length".
    """

    id: str
    task: str
    text: str
    right: bool
    tokens: int
    finish_reason: str


def render_prompts(samples: Sequence[Sample], processor: Processor) -> list[Rendered]:
    """The questions alone, ready to be answered."""
    return [render(sample.messages[:-1], processor, add_generation_prompt=True) for sample in samples]


def ask(
    params: Params,
    model: ModelConfig,
    processor: Processor,
    samples: Sequence[Sample],
    *,
    prompts: Sequence[Rendered] | None = None,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    shape: BatchShape | None = None,
    max_rows: int = 64,
) -> list[Reply]:
    """One reply to each sample.

    Args:
      params, model, processor: what answers.
      samples: whose last message is the reference and is not shown.
      prompts: `render_prompts` of the samples, where the caller has them already.
      max_new_tokens: where a reply is cut.
      temperature: 0 takes the most likely token.
      seed: of the sampling; the same seed gives the same replies.
      shape, max_rows: see `mindjax.inference.sampler.generate`.

    Raises:
      ValueError: a sample without a verifiable answer.
    """
    for sample in samples:
        if sample.answer is None:
            raise ValueError(f"sample {sample.id!r} has no verifiable answer")
    prompts = render_prompts(samples, processor) if prompts is None else prompts
    sampling = SamplingConfig(max_new_tokens, temperature, stop_token_ids=(processor.im_end_token_id,))
    keys = sampling_keys(seed, 0, range(len(samples)), 1) if temperature > 0 else None
    answers = generate(params, model, prompts, sampling=sampling, keys=keys, shape=shape, max_rows=max_rows)
    replies = []
    with Worker() as worker:
        for sample, (answer,) in zip(samples, answers, strict=True):
            spoken = [token for token in answer.token_ids if token != processor.im_end_token_id]
            text = processor.tokenizer.decode(spoken, skip_special_tokens=False)
            assert sample.answer is not None
            right = is_right(sample.answer, text, worker.maths)
            replies.append(Reply(sample.id, sample.task, text, right, len(answer.token_ids), answer.finish_reason))
    return replies


def write_replies(path: Path, replies: Sequence[Reply]) -> None:
    """Writes replies as JSONL, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.write_text("".join(json.dumps(asdict(reply), ensure_ascii=False) + "\n" for reply in replies), "utf-8")
    os.replace(draft, path)


def read_replies(path: Path) -> list[Reply]:
    """The inverse of `write_replies`."""
    # Not splitlines(): a reply may hold characters that Unicode calls line ends, and JSON does not escape.
    return [Reply(**json.loads(line)) for line in path.read_text("utf-8").split("\n") if line]


def accuracy(replies: Sequence[Reply]) -> dict[str, Interval]:
    """Share of right replies with a 95 % interval, per task in order of appearance."""
    tasks = dict.fromkeys(reply.task for reply in replies)
    verdicts = {task: [reply.right for reply in replies if reply.task == task] for task in tasks}
    return {task: wilson(sum(right), len(right)) for task, right in verdicts.items()}


def table(columns: Mapping[str, Mapping[str, Interval]], baselines: Mapping[str, float]) -> str:
    """Accuracies as text: one line per task, one column per model, the blind baseline first."""
    tasks = dict.fromkeys(task for column in columns.values() for task in column)
    width = max(len(task) for task in tasks)
    header = f"{'':{width}}  {'blind':>6}" + "".join(f"  {name:>18}" for name in columns)
    lines = [header]
    for task in tasks:
        cells = [f"{task:{width}}", f"{baselines[task]:6.1%}" if task in baselines else " " * 6]
        for column in columns.values():
            cells.append(f"{column[task]:.0%}".rjust(18) if task in column else " " * 18)
        lines.append("  ".join(cells))
    return "\n".join(lines)


@dataclass(frozen=True)
class EvalRun:
    """What an experiment of kind "eval" sets.

    Attributes:
      model: a model folder.
      data: the items to judge, each with a verifiable answer.
      baseline: what the blind baseline learns from; None prints none.
      max_new_tokens, temperature, seed: of the replies.
      max_pixels: of an image; 0 leaves the processor's own limit.
    """

    model: str
    data: DataConfig
    baseline: DataConfig | None = None
    max_new_tokens: int = 16
    temperature: float = 0.0
    seed: int = 0
    max_pixels: int = 0


def main(config: ConfigDict, workdir: Path) -> None:
    """Judges a model folder: prints the accuracy of each task, writes `replies.jsonl` and `accuracy.json`."""
    from mindjax.train.folder import open_model

    run = to_dataclass(EvalRun, {key: value for key, value in config.items() if key != "kind"})
    samples = run.data.load()
    model, params, processor = open_model(run.model, samples, run.max_pixels)
    replies = ask(
        params, model, processor, samples,
        max_new_tokens=run.max_new_tokens, temperature=run.temperature, seed=run.seed,
    )  # fmt: skip
    write_replies(workdir / "replies.jsonl", replies)
    accuracies = accuracy(replies)
    baselines = _baselines(run.baseline.load(), samples) if run.baseline else {}
    result = {task: {**asdict(value), "blind": baselines.get(task)} for task, value in accuracies.items()}
    (workdir / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table({"accuracy": accuracies}, baselines))


def _baselines(train: Sequence[Sample], held_out: Sequence[Sample]) -> dict[str, float]:
    tasks = dict.fromkeys(sample.task for sample in held_out)
    return {
        task: blind_baseline([s for s in train if s.task == task], [s for s in held_out if s.task == task])
        for task in tasks
        if any(s.task == task for s in train)
    }
