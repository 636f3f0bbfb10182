"""Where the samples of a run come from: a JSONL file, or verifiable tasks drawn on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mindjax.config import ModelConfig
from mindjax.data import tasks
from mindjax.data.images import ImageProcessor
from mindjax.data.processor import Processor
from mindjax.data.tokenizer import train_tokenizer
from mindjax.data.video import VideoProcessor
from mindjax.types import Sample


@dataclass(frozen=True)
class DataConfig:
    """Either a file or task families.

    Attributes:
      path: of a JSONL file, see `read_samples`.
      families: of `mindjax.data.tasks`, drawn instead.
      variant, split, count, seed: of the drawn samples, `count` per family.
    """

    path: str = ""
    families: tuple[str, ...] = ()
    variant: str = "cloze"
    split: Literal["train", "test"] = "train"
    count: int = 0
    seed: int = 0

    def load(self) -> list[Sample]:
        """The samples.

        Raises:
          ValueError: neither or both of `path` and `families` are set, or what they name is wrong.
        """
        if bool(self.path) == bool(self.families):
            raise ValueError("data needs either path, a JSONL file, or families, names of task families")
        if self.path:
            return read_samples(self.path)
        return [
            sample
            for family in self.families
            for sample in tasks.build(family, self.split, self.count, self.seed, self.variant)  # type: ignore[arg-type]
        ]


def read_samples(path: str | Path) -> list[Sample]:
    """Reads conversations, one JSON object per line.

    A line is {"messages": [...]} in the HF chat format, e.g. {"role": "user", "content": [{"type": "image", "image":
    "cat.png"}, {"type": "text", "text": "What is this?"}]}. Optional: "id" (else the line number), "task",
    "answer" for a verifier, and "rejected", the reply that loses to the last message of a preference pair. Relative
    image and video paths start at the folder of the file.

    Raises:
      ValueError: a line that is no such object; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no data file {path}")
    samples = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                samples.append(_sample(line, f"{path}, line {number}", str(number), path.parent))
    if not samples:
        raise ValueError(f"{path} holds no conversation")
    return samples


def difficulty_levels(samples: Sequence[Sample], count: int) -> list[int]:
    """The level of each sample, 0 to count - 1: each task's samples, by difficulty, in `count` equal parts.

    Sorted by level, every task keeps its share all the way: one sorted by difficulty alone would begin with the tasks
    whose unit is smallest, and forget them.
    """
    by_task: dict[str, list[int]] = {}
    # Equal ones are spread by chance: they often stand one kind of sample after the other.
    for i in np.random.default_rng(0).permutation(len(samples)).tolist():
        by_task.setdefault(samples[i].task, []).append(i)
    levels = [0] * len(samples)
    for members in by_task.values():
        for rank, i in enumerate(sorted(members, key=lambda i: samples[i].difficulty)):
            levels[i] = rank * count // len(members)
    return levels


def new_processor(model: ModelConfig, samples: Sequence[Sample], max_pixels: int) -> tuple[ModelConfig, Processor]:
    """A processor for a model without a folder: a tokenizer trained on the samples, the model's patch sizes.

    Args:
      model: its vocabulary bounds the tokenizer's.
      samples: whose text the tokenizer learns.
      max_pixels: of an image.

    Returns:
      (the model with the control tokens of this tokenizer, the processor).
    """
    tokenizer = train_tokenizer((text for sample in samples for text in _texts(sample)), model.text.vocab_size)
    vision = model.vision
    sizes: dict[str, Any] = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "min_pixels": (vision.patch_size * vision.spatial_merge_size) ** 2,
        "max_pixels": max_pixels,
    }
    processor = Processor(tokenizer, ImageProcessor(**sizes), VideoProcessor(**sizes), str(tokenizer.chat_template))
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return replace(model, **{name: getattr(processor, name) for name in names}), processor


def _sample(line: str, where: str, number: str, folder: Path) -> Sample:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
        raise ValueError(f'{where}: a line is an object with a list of "messages"')
    unknown = sorted(record.keys() - {"messages", "id", "task", "answer", "rejected"})
    if unknown:
        raise ValueError(f"{where}: unknown keys {unknown}; known are messages, id, task, answer, rejected")
    messages = tuple(_with_paths(message, where, folder) for message in record["messages"])
    return Sample(
        messages=messages,
        id=str(record.get("id", number)),
        task=record.get("task", ""),
        answer=record.get("answer"),
        rejected=record.get("rejected"),
    )


def _with_paths(message: Any, where: str, folder: Path) -> dict[str, Any]:
    """The message with media paths as seen from here."""
    if not isinstance(message, dict) or "role" not in message:
        raise ValueError(f'{where}: a message is an object with "role" and "content"')
    if not isinstance(message.get("content"), list):
        return message

    def resolve(part: Any) -> Any:
        if not isinstance(part, dict):
            raise ValueError(f"{where}: a part of a message is an object, not {part!r}")
        return {**part, **{key: place(part[key]) for key in ("image", "video", "path") if key in part}}

    def place(source: Any) -> Any:
        if isinstance(source, list):  # the frames of a video
            return [place(frame) for frame in source]
        return str(folder / source) if isinstance(source, str) and "://" not in source else source

    return {**message, "content": [resolve(part) for part in message["content"]]}


def _texts(sample: Sample) -> list[str]:
    texts = [] if sample.rejected is None else [sample.rejected]
    for message in sample.messages:
        # The chat template writes the role; it should be a token, not six.
        texts.append(f"{message['role']}\n")
        content = message.get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if "text" in part]
    return texts
