"""Families about handwritten digits on faded photographs."""

from __future__ import annotations

import numpy as np

from mindjax.data.tasks.item import Item
from mindjax.data.tasks.sources import CELL, GLYPH_SIZE, Split, background, clutter, glyphs, paint

PLACES = ("left", "middle", "right")


def _sheet(
    split: Split, rng: np.random.Generator, digits: list[int], columns: int
) -> tuple[np.ndarray, tuple[str, ...], float]:
    """Writes the digits row by row, `columns` in each, with ink well set off from a faded photograph.

    Returns:
      the picture, its sources, and how hard it is to read: `clutter`.
    """
    height, width = CELL * (len(digits) // columns), CELL * columns
    photograph, photograph_name = background(split, height, width, rng)
    dark_ink = rng.random() < 0.7
    fade = rng.uniform(0.0, 0.4)
    paper = rng.uniform(225, 255) if dark_ink else rng.uniform(0, 40)
    canvas = paper + fade * (photograph - paper)
    # The ink keeps its distance from the paper: a glyph nobody could read would only be noise.
    ink = rng.uniform(0, 70, 3) if dark_ink else rng.uniform(200, 255, 3)
    names, difficulty = [photograph_name], clutter(canvas, ink)
    room = CELL - GLYPH_SIZE
    for place, digit in enumerate(digits):
        mask, name = glyphs(split).draw(digit, rng)
        row, column = divmod(place, columns)
        top, left = CELL * row + int(rng.integers(room + 1)), CELL * column + int(rng.integers(room + 1))
        paint(canvas, mask, top, left, ink)
        names.append(name)
    return canvas.astype(np.uint8), tuple(names), difficulty


def _misread(text: str, rng: np.random.Generator, right: tuple[str, ...]) -> tuple[str, ...]:
    """Three different texts, each with one digit of `text` changed, none of them `right`."""
    wrong: list[str] = []
    while len(wrong) < 3:
        place = int(rng.integers(len(text)))
        other = f"{text[:place]}{(int(text[place]) + int(rng.integers(1, 10))) % 10}{text[place + 1 :]}"
        if other not in wrong and other not in right:
            wrong.append(other)
    return tuple(wrong)


def digit_read(split: Split, rng: np.random.Generator) -> Item:
    """Three digits in a row, read from left to right."""
    digits = [int(d) for d in rng.integers(0, 10, 3)]
    image, names, difficulty = _sheet(split, rng, digits, 3)
    reply = "".join(map(str, digits))
    answer = {"kind": "exact", "value": reply}
    return Item(image, "Read the digits.", reply, answer, _misread(reply, rng, (reply,)), names, difficulty)


def digit_largest(split: Split, rng: np.random.Generator) -> Item:
    """Which of three digits is the largest, by place."""
    place = int(rng.integers(3))
    top = int(rng.integers(1, 10))
    digits = [int(d) for d in rng.integers(0, top, 3)]
    digits[place] = top
    image, names, difficulty = _sheet(split, rng, digits, 3)
    reply = PLACES[place]
    wrong = tuple(p for p in PLACES if p != reply)
    return Item(
        image, "Which digit is the largest?", reply, {"kind": "exact", "value": reply}, wrong, names, difficulty
    )


def digit_count(split: Split, rng: np.random.Generator) -> Item:
    """How often one digit occurs among four."""
    count, wanted = int(rng.integers(0, 4)), int(rng.integers(0, 10))
    others = [d for d in range(10) if d != wanted]
    digits = [wanted] * count + [int(d) for d in rng.choice(others, 4 - count)]
    rng.shuffle(digits)
    image, names, difficulty = _sheet(split, rng, digits, 2)
    wrong = tuple(str(c) for c in range(4) if c != count)
    return Item(
        image, f"How many {wanted}s?", str(count), {"kind": "exact", "value": str(count)}, wrong, names, difficulty
    )


def digit_any(split: Split, rng: np.random.Generator) -> Item:
    """Three two-digit numbers, one below the other; naming any one of them is right.

    The demonstration names one at random, so a reader that imitates must keep all three in play; one that is
    rewarded may settle on the number it reads best.
    """
    numbers = [f"{n:02d}" for n in rng.choice(100, 3, replace=False)]
    digits = [int(d) for number in numbers for d in number]
    image, names, difficulty = _sheet(split, rng, digits, 2)
    reply = str(rng.choice(numbers))
    answer = {"kind": "one_of", "value": numbers}
    return Item(image, "Name any one number.", reply, answer, _misread(reply, rng, tuple(numbers)), names, difficulty)
