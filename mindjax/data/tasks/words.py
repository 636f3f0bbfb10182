"""Words set in matplotlib's fonts over photographs."""

from __future__ import annotations

import numpy as np

from mindjax.data.tasks.item import Item
from mindjax.data.tasks.sources import FONTS, Split, background, paint, text_mask

WORDS = (
    "apple", "bird", "boat", "book", "bread", "chair", "cloud", "door", "eagle", "fish", "flag", "frog", "glass",
    "grape", "horse", "house", "juice", "knife", "lamp", "lemon", "light", "mouse", "night", "ocean", "paper", "piano",
    "plane", "queen", "river", "snow", "spoon", "stone", "sugar", "table", "tiger", "train", "voice", "water", "wheel",
    "zebra",
)  # fmt: skip


def word_read(split: Split, rng: np.random.Generator) -> Item:
    """Reads one word; held-out pictures use other fonts and other photographs."""
    word = str(rng.choice(WORDS))
    font = str(rng.choice(FONTS[split]))
    photograph, name = background(split, 32, 80, rng)
    size = int(rng.integers(18, 23))
    while (mask := text_mask(word, font, size)).shape[1] > 78:
        size -= 1
    dark = rng.random() < 0.5
    canvas = 128 + rng.uniform(0.2, 0.5) * (photograph - 128) + (70 if dark else -70)
    ink = rng.uniform(0, 60, 3) if dark else rng.uniform(195, 255, 3)
    paint(canvas := np.clip(canvas, 0, 255), mask, int(rng.integers(0, 33 - mask.shape[0])),
          int(rng.integers(0, 81 - mask.shape[1])), ink)  # fmt: skip
    others = rng.choice([w for w in WORDS if w != word], 3, replace=False)
    answer = {"kind": "exact", "value": word}
    return Item(canvas.astype(np.uint8), "Read the word.", word, answer, tuple(map(str, others)), (name, f"font/{font}"))
