"""The smallest policy that has a tokenizer, and questions with and without a picture for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from mindjax.config import ModelConfig
from mindjax.data.processor import Processor
from mindjax.data.samples import new_processor
from mindjax.models import qwen3_vl
from mindjax.types import Sample
from tests.train import tiny

ANSWERS = ("red", "blue", "left")


def samples(count: int = 8) -> list[Sample]:
    """Different pictures, every other question without one; any answer but "red" is wrong."""
    rng = np.random.default_rng(0)
    result = []
    for i in range(count):
        image = {"type": "image", "image": rng.integers(0, 255, (8 + 8 * (i % 3), 16, 3)).astype(np.uint8)}
        text = {"type": "text", "text": "colour?" + " now" * (i % 4)}
        user: dict[str, Any] = {"role": "user", "content": [image, text] if i % 2 else [text]}
        reply = {"role": "assistant", "content": ANSWERS[i % 3]}
        result.append(Sample((user, reply), f"s{i}", "colour", {"kind": "exact", "value": "red"}))
    return result


def letters(count: int = 8) -> list[Sample]:
    """The same questions; any reply of one letter of the first half of the alphabet is right: a tenth by chance."""
    answer = {"kind": "one_of", "value": list("abcdefghijklm")}
    return [replace(sample, answer=answer) for sample in samples(count)]


def policy(moe: bool = False) -> tuple[ModelConfig, Any, Processor]:
    """(config, parameters, processor)."""
    base = tiny.moe_model() if moe else tiny.model()
    base = replace(base, text=replace(base.text, vocab_size=320))
    config, processor = new_processor(base, samples(), max_pixels=32 * 32)
    return config, qwen3_vl.init(config, jax.random.key(0)), processor
