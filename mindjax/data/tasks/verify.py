"""Judges a reply against what an item knows about its right answers.

An answer is `{"kind": ..., "value": ...}`:
  exact   the reply is `value` (case and surrounding spaces aside)
  one_of  the reply is any of the list `value`
  within  the reply is a whole number at most `tolerance` away from `value`
With `"boxed": True` only what stands in `\\boxed{}` counts, so that a right value in the wrong form is wrong.
"""

from __future__ import annotations

import re
from typing import Any

_BRACE = re.compile(r"\\boxed\{|\\[{}]|[{}]")


def extract(reply: str) -> tuple[str, bool]:
    """What the reply says, and whether it said so in `\\boxed{}` (the last one that is closed counts)."""
    box = _last_box(reply)
    text = reply if box is None else reply[box]
    return text.strip().rstrip(".").strip().lower(), box is not None


def _last_box(reply: str) -> slice | None:
    """Where the contents of the last closed `\\boxed{}` stand; braces inside it pair up, escaped ones are text.

    One pass, whatever the reply: a policy may well learn to write ten thousand boxes.
    """
    last, opened = None, []
    for brace in _BRACE.finditer(reply):
        if brace[0] in ("{", "\\boxed{"):
            opened.append(brace)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{" and (last is None or start.end() > last.start):
                last = slice(start.end(), brace.start())
    return last


def is_right(answer: dict[str, Any], reply: str) -> bool:
    """Whether `reply` is right.

    Raises:
      ValueError: for an unknown kind of answer.
    """
    said, boxed = extract(reply)
    if answer.get("boxed", False) and not boxed:
        return False
    kind, value = answer["kind"], answer["value"]
    if kind == "exact":
        return said == str(value).lower()
    if kind == "one_of":
        return said in {str(v).lower() for v in value}
    if kind == "within":
        return re.fullmatch(r"[0-9]{1,4}", said) is not None and abs(int(said) - value) <= answer["tolerance"]
    raise ValueError(f"answer kind {kind!r} is not known; known are 'exact', 'one_of' and 'within'")
