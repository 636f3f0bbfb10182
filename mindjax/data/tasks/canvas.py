"""A digit on a small card somewhere on a large photograph: far too small to read in a picture of a token or two.

Shrunk to 32 pixels a side, the card is a coloured spot five pixels wide whose place can be seen and whose digit
cannot; a crop around it shows the digit nearly as large as other families do.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from mindjax.data.tasks.item import Item
from mindjax.data.tasks.sources import CELL, Split, background, glyphs, paint

CANVAS = 160  # pixels a side
CARD = 26
# Half of GLYPH_SIZE: the handwriting has 8 x 8 pixels of detail, which 13 still hold.
DIGIT = 13
MARGIN = 8  # between a card and the edge
QUESTION = "Which digit is on the card?"
CARDS = {"red": (215, 40, 40), "yellow": (250, 215, 30), "blue": (40, 80, 220), "green": (30, 160, 60)}


def digit_canvas(split: Split, rng: np.random.Generator) -> Item:
    """The digit on the one card; `answer["box"]` is the card's (left, top, right, bottom) in pixels."""
    # A small photograph, enlarged: a calm scene, and crops that other families draw from too.
    photograph, name = background(split, 2 * CELL, 2 * CELL, rng)
    enlarged = Image.fromarray(photograph.astype(np.uint8)).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
    grey = np.asarray(enlarged, np.float32).mean(axis=2, keepdims=True)
    # Faded to grey, so that the card's colour stands out anywhere.
    canvas = np.repeat(128 + rng.uniform(0.4, 0.8) * (grey - 128), 3, axis=2)
    digit = int(rng.integers(10))
    top, left = (int(p) for p in rng.integers(MARGIN, CANVAS - CARD - MARGIN + 1, 2))
    colour = CARDS[str(rng.choice(list(CARDS)))]
    paint(canvas, np.ones((CARD, CARD), np.float32), top, left, colour)
    mask, glyph = glyphs(split).draw(digit, rng)
    small = mask.reshape(DIGIT, 2, DIGIT, 2).mean((1, 3))
    # White on dark cards, black on the bright one; the digit in the middle of its card.
    ink = (0, 0, 0) if sum(colour) > 400 else (255, 255, 255)
    down, right = (int(p) for p in rng.integers(5, 9, 2))
    paint(canvas, small, top + down, left + right, ink)
    wrong = tuple(str((digit + int(step)) % 10) for step in rng.choice(np.arange(1, 10), 3, replace=False))
    answer = {"kind": "exact", "value": str(digit), "box": [left, top, left + CARD, top + CARD]}
    difficulty = float(canvas.std())
    return Item(canvas.astype(np.uint8), QUESTION, str(digit), answer, wrong, (name, glyph), difficulty)
