"""Families about handwritten digits on faded photographs."""

from __future__ import annotations

import numpy as np

from mindjax.data.tasks.item import Item
from mindjax.data.tasks.sources import GLYPH_SIZE, Split, background, glyphs, paint

PLACES = ("left", "middle", "right")


def _sheet(
    split: Split, rng: np.random.Generator, digits: list[int], centres: list[tuple[float, float]], height: int, width: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Writes each digit around its centre (y, x), with ink well set off from a faded photograph."""
    photograph, photograph_name = background(split, height, width, rng)
    dark_ink = rng.random() < 0.7
    fade = rng.uniform(0.0, 0.4)
    paper = rng.uniform(225, 255) if dark_ink else rng.uniform(0, 40)
    canvas = paper + fade * (photograph - paper)
    # The ink keeps its distance from the paper: a glyph nobody could read would only be noise.
    ink = rng.uniform(0, 70, 3) if dark_ink else rng.uniform(200, 255, 3)
    names = [photograph_name]
    for digit, (y, x) in zip(digits, centres, strict=True):
        mask, name = glyphs(split).draw(digit, rng)
        jitter_y, jitter_x = rng.uniform(-2, 2), rng.uniform(-3, 3)
        top = int(np.clip(round(y + jitter_y - GLYPH_SIZE / 2), 0, height - GLYPH_SIZE))
        left = int(np.clip(round(x + jitter_x - GLYPH_SIZE / 2), 0, width - GLYPH_SIZE))
        paint(canvas, mask, top, left, ink)
        names.append(name)
    return canvas.astype(np.uint8), tuple(names)


def _row(y: float, xs: tuple[float, ...]) -> list[tuple[float, float]]:
    return [(y, x) for x in xs]


def _misread(text: str, rng: np.random.Generator) -> str:
    """The digits of `text` with one of them changed."""
    place = int(rng.integers(len(text)))
    other = (int(text[place]) + int(rng.integers(1, 10))) % 10
    return text[:place] + str(other) + text[place + 1 :]


def digit_read(split: Split, rng: np.random.Generator) -> Item:
    """Three digits in a row, read from left to right."""
    digits = [int(d) for d in rng.integers(0, 10, 3)]
    image, names = _sheet(split, rng, digits, _row(16, (14, 40, 66)), 32, 80)
    reply = "".join(map(str, digits))
    wrong = (_misread(reply, rng), _misread(reply, rng), _misread(reply, rng))
    return Item(image, "Read the digits.", reply, {"kind": "exact", "value": reply}, wrong, names)


def digit_largest(split: Split, rng: np.random.Generator) -> Item:
    """Which of three digits is the largest, by place."""
    place = int(rng.integers(3))
    top = int(rng.integers(1, 10))
    digits = [int(d) for d in rng.integers(0, top, 3)]
    digits[place] = top
    image, names = _sheet(split, rng, digits, _row(16, (14, 40, 66)), 32, 80)
    reply = PLACES[place]
    wrong = tuple(p for p in PLACES if p != reply)
    return Item(image, "Which digit is the largest?", reply, {"kind": "exact", "value": reply}, wrong, names)


def digit_count(split: Split, rng: np.random.Generator) -> Item:
    """How often one digit occurs among six."""
    count, wanted = int(rng.integers(0, 5)), int(rng.integers(0, 10))
    others = [d for d in range(10) if d != wanted]
    digits = [wanted] * count + [int(d) for d in rng.choice(others, 6 - count)]
    rng.shuffle(digits)
    centres = _row(12, (14, 40, 66)) + _row(36, (14, 40, 66))
    image, names = _sheet(split, rng, digits, centres, 48, 80)
    wrong = tuple(str(c) for c in range(5) if c != count)
    return Item(image, f"How many {wanted}s?", str(count), {"kind": "exact", "value": str(count)}, wrong, names)


def digit_any(split: Split, rng: np.random.Generator) -> Item:
    """Three two-digit numbers, one below the other; naming any one of them is right.

    The demonstration names one at random, so a reader that imitates must keep all three in play; one that is
    rewarded may settle on the number it reads best.
    """
    numbers = [f"{n:02d}" for n in rng.choice(100, 3, replace=False)]
    digits = [int(d) for number in numbers for d in number]
    centres = [(y, x) for y in (13, 40, 67) for x in (13, 35)]
    image, names = _sheet(split, rng, digits, centres, 80, 48)
    reply = str(rng.choice(numbers))
    wrong = tuple(w for w in (_misread(reply, rng) for _ in range(8)) if w not in numbers)[:3]
    return Item(image, "Name any one number.", reply, {"kind": "one_of", "value": numbers}, wrong, names)
