"""Letters set in matplotlib's fonts over photographs."""

from __future__ import annotations

import numpy as np

from mindjax.data.tasks.item import Item
from mindjax.data.tasks.sources import CELL, FONTS, Split, background, clutter, paint, text_mask

LETTERS = "ABCDEFGHJKLMNPRSTUXYZ"


def letters_read(split: Split, rng: np.random.Generator) -> Item:
    """Three letters in one font, read from left to right; held-out pictures have other fonts and photographs."""
    letters = [str(c) for c in rng.choice(list(LETTERS), 3)]
    font = str(rng.choice(FONTS[split]))
    photograph, name = background(split, CELL, 3 * CELL, rng)
    dark = rng.random() < 0.5
    canvas = np.clip(128 + rng.uniform(0.2, 0.5) * (photograph - 128) + (70 if dark else -70), 0, 255)
    ink = rng.uniform(0, 60, 3) if dark else rng.uniform(195, 255, 3)
    size, difficulty = int(rng.integers(24, 30)), clutter(canvas, ink)
    for column, letter in enumerate(letters):
        mask = text_mask(letter, font, size)[:CELL, :CELL]
        spare_y, spare_x = CELL - mask.shape[0], CELL - mask.shape[1]
        # About the middle of its cell.
        top = int(np.clip(round(spare_y / 2 + rng.uniform(-2, 2)), 0, spare_y))
        left = int(np.clip(round(spare_x / 2 + rng.uniform(-2, 2)), 0, spare_x))
        paint(canvas, mask, top, CELL * column + left, ink)
    reply = " ".join(letters)
    wrong: list[str] = []
    while len(wrong) < 3:
        place = int(rng.integers(3))
        other = str(rng.choice([c for c in LETTERS if c != letters[place]]))
        text = " ".join([*letters[:place], other, *letters[place + 1 :]])
        if text not in wrong:
            wrong.append(text)
    answer = {"kind": "exact", "value": reply}
    names = (name, f"font/{font}")
    return Item(canvas.astype(np.uint8), "Read the letters.", reply, answer, tuple(wrong), names, difficulty)
