"""One picture with a question, before it becomes a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Item:
    """A drawn question.

    Attributes:
      image: [H, W, 3] uint8, or None for a question in text alone.
      question: what is asked.
      reply: one right reply, drawn uniformly where there are several.
      answer: what `verify.is_right` needs.
      wrong: different plausible wrong replies, at least two, for multiple choice and preference pairs.
      sources: names of the glyphs, photographs and fonts in the picture.
    """

    image: np.ndarray | None
    question: str
    reply: str
    answer: dict[str, Any]
    wrong: tuple[str, ...]
    sources: tuple[str, ...] = ()
