"""Questions without any picture, so that a model that has learned to look still reads."""

from __future__ import annotations

import numpy as np

from mindjax.data.tasks.digits import PLACES
from mindjax.data.tasks.item import Item
from mindjax.data.tasks.sources import Split


def text_only(split: Split, rng: np.random.Generator) -> Item:
    """Which of three written digits is the largest, or how often a digit occurs; held-out digit rows are other rows."""
    while True:
        digits = [int(d) for d in rng.integers(0, 10, 3)]
        # A row of three digits is the source of such a question: every fifth row is held out.
        if (int("".join(map(str, digits))) % 5 == 0) != (split == "test"):
            continue
        if digits.count(max(digits)) == 1:
            break
    row = " ".join(map(str, digits))
    if rng.random() < 0.5:
        reply = PLACES[int(np.argmax(digits))]
        wrong = tuple(p for p in PLACES if p != reply)
        question = f"{row}. Which digit is the largest?"
    else:
        reply = str(digits[PLACES.index(place := str(rng.choice(PLACES)))])
        wrong = tuple(str(d) for d in range(10) if str(d) != reply)[:3]
        question = f"{row}. Which digit is {place}?"
    return Item(None, question, reply, {"kind": "exact", "value": reply}, wrong, (f"row/{row}",))
