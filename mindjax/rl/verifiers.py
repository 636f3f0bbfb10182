"""Judges replies against typed answers, for rewards.

What an answer may be, and how the final answer is taken out of a reply, is decided in one place for training and
evaluation, `mindjax.data.tasks.verify`; here it becomes a number.
"""

from __future__ import annotations

from typing import Any

from mindjax.data.tasks.verify import is_right

# A reply longer than this is no answer to anything we ask; what it costs to look at one stays bounded.
MAX_CHARACTERS = 100_000


def verify(reply: str, answer: dict[str, Any] | None) -> float:
    """1.0 for a right reply, 0.0 for a wrong one.

    Args:
      reply: the text of a completion.
      answer: of the sample, {"kind": ..., "value": ..., ...}.

    Raises:
      ValueError: the sample has no answer, or one of an unknown kind.
    """
    if answer is None:
        raise ValueError("this sample has no answer to verify a reply against; leave it out, or reward something else")
    return float(is_right(answer, reply[:MAX_CHARACTERS]))
