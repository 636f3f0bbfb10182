"""Judges replies against typed answers, for rewards.

What an answer may be, and how the final answer is taken out of a reply, is decided in one place for training and
evaluation, `mindjax.data.tasks.verify`; here it becomes a number, and what could not be judged is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from mindjax.data.tasks import verify as answers

# A reply longer than this is no answer to anything we ask; what it costs to look at one stays bounded.
MAX_CHARACTERS = 100_000


class Verifier:
    """Judges replies one by one."""

    def __init__(self, timeout: float = 3.0) -> None:
        self.timeout = timeout
        self._counts: Counter[str] = Counter()

    def __call__(self, reply: str, answer: dict[str, Any] | None) -> float:
        """1.0 for a right reply, 0.0 for a wrong one.

        Raises:
          ValueError: the sample has no answer, or one of an unknown kind.
        """
        if answer is None:
            raise ValueError("this sample has no answer to verify; leave it out, or reward something else")
        return float(not self._too_long(reply) and answers.is_right(answer, reply))

    def form(self, reply: str, pattern: str) -> float:
        """1.0 where all of the reply matches `pattern`, or where it has a closed `\\boxed{}` if that is empty."""
        if self._too_long(reply):
            return 0.0
        return float(bool(re.fullmatch(pattern, reply, re.DOTALL)) if pattern else answers.extract(reply)[1])

    def overlap(self, reply: str, answer: dict[str, Any] | None) -> float:
        """Intersection over union of the boxes."""
        return 0.0

    def counters(self) -> dict[str, float]:
        return {name: float(self._counts[name]) for name in ("too_long",)}

    def close(self) -> None:
        """Ends the worker."""

    def _too_long(self, reply: str) -> bool:
        if len(reply) > MAX_CHARACTERS:
            self._counts["too_long"] += 1
            return True
        return False


def verify(reply: str, answer: dict[str, Any] | None) -> float:
    """1.0 for a right reply, 0.0 for a wrong one."""
    return Verifier()(reply, answer)
