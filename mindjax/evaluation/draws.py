"""Held-out items asked several times: greedily, and some times at temperature 1."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindjax.config import ModelConfig
from mindjax.data.packing import BatchShape
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered
from mindjax.data.tasks.verify import extract, is_right
from mindjax.inference.sampler import SamplingConfig, generate, sampling_keys
from mindjax.types import Sample

Params = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """One reply and the verdict.

    Attributes:
      text: as decoded, the stop token left out.
      right: whether the sample's verifier accepts it.
      tokens: generated, the stop token included.
      surprise: -log p of the reply, in nats; its mean over replies at temperature 1 estimates their entropy.
      finish: why it ended, see `mindjax.types.Completion`.
    """

    text: str
    right: bool
    tokens: int
    surprise: float
    finish: str


def draw(
    params: Params,
    model: ModelConfig,
    processor: Processor,
    samples: Sequence[Sample],
    prompts: Sequence[Rendered],
    sampling: SamplingConfig,
    *,
    seed: int,
    shape: BatchShape | None = None,
) -> list[list[Reply]]:
    """`sampling.num_samples` judged replies to each prompt.

    Args:
      params, model, processor: what answers.
      samples: what the prompts are of, each with an answer.
      prompts: `mindjax.evaluation.run.render_prompts` of the samples.
      sampling: the stop token is added.
      seed: the same seed draws with the same random numbers whatever the parameters.
      shape: of a prefill batch.
    """
    stop = processor.im_end_token_id
    keys = sampling_keys(seed, 0, range(len(prompts)), sampling.num_samples)
    sampling = replace(sampling, stop_token_ids=(stop,))
    answers = generate(params, model, prompts, sampling=sampling, keys=keys, shape=shape)
    result = []
    for sample, completions in zip(samples, answers, strict=True):
        assert sample.answer is not None
        replies = []
        for c in completions:
            spoken = [token for token in c.token_ids if token != stop]
            text = processor.tokenizer.decode(spoken, skip_special_tokens=False)
            right = is_right(sample.answer, text)
            replies.append(Reply(text, right, len(c.token_ids), -float(sum(c.logprobs)), c.finish_reason))
        result.append(replies)
    return result


def examine(
    params: Params,
    model: ModelConfig,
    processor: Processor,
    samples: Sequence[Sample],
    prompts: Sequence[Rendered],
    sampling: SamplingConfig,
    *,
    shape: BatchShape | None = None,
) -> list[dict[str, Any]]:
    """One record of each item, `record`; the same random numbers whatever the model, so that comparisons pair in them.

    Args:
      sampling: of the drawn replies; the greedy one differs in temperature and number alone.
      params, model, processor, samples, prompts, shape: see `draw`.
    """
    once = replace(sampling, temperature=0.0, num_samples=1)
    greedy = draw(params, model, processor, samples, prompts, once, seed=0, shape=shape)
    drawn = draw(params, model, processor, samples, prompts, sampling, seed=0, shape=shape)
    return [record(sample, best, more) for sample, (best,), more in zip(samples, greedy, drawn, strict=True)]


def record(sample: Sample, greedy: Reply, drawn: Sequence[Reply]) -> dict[str, Any]:
    """What is kept of the replies to one item.

    Returns:
      "id" and "task"; of the greedy reply "text" and "greedy", 1 where it is right; of the drawn ones lists "texts",
      "right" (0 or 1), "tokens", "surprise" and "finish"; and "distinct", how many different right ones are among them.
    """
    return {
        "id": sample.id,
        "task": sample.task,
        "greedy": int(greedy.right),
        "text": greedy.text,
        "right": [int(reply.right) for reply in drawn],
        "texts": [reply.text for reply in drawn],
        "tokens": [reply.tokens for reply in drawn],
        "surprise": [round(reply.surprise, 6) for reply in drawn],
        "finish": [reply.finish for reply in drawn],
        "distinct": len({canonical(reply.text) for reply in drawn if reply.right}),
    }


def canonical(text: str) -> str:
    """What a reply names, in or out of a box, however it is written."""
    return " ".join(extract(text)[0].split())


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes records as JSONL, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(draft, path)


def read(path: Path) -> list[dict[str, Any]]:
    """The inverse of `write`; [] without a file."""
    return [json.loads(line) for line in path.read_text().split("\n") if line] if path.exists() else []
