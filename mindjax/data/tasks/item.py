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
      difficulty: rises with how hard the picture is to read, in a unit of the family's own; it says nothing about
        the reply, so that a curriculum that begins with the easy items does not begin with some of the replies.
    """

    image: np.ndarray | None
    question: str
    reply: str
    answer: dict[str, Any]
    wrong: tuple[str, ...]
    sources: tuple[str, ...] = ()
    difficulty: float = 0.0
