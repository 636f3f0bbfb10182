"""Families about shapes and markers drawn over photographs."""

from __future__ import annotations

import functools

import numpy as np

from mindjax.data.tasks.item import Item
from mindjax.data.tasks.sources import CELL, Split, background, paint

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 215, 30),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
}
SHAPES = ("circle", "square", "triangle", "cross")
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
TOLERANCE = 5  # percent of the width, for `locate`


@functools.cache
def _shape(name: str, size: int) -> np.ndarray:
    """Coverage mask [size, size], antialiased by drawing at four times the size."""
    fine = (np.arange(4 * size) + 0.5) / (4 * size) * 2 - 1
    y, x = np.meshgrid(fine, fine, indexing="ij")
    inside = {
        "circle": x**2 + y**2 <= 0.95,
        "square": np.maximum(abs(x), abs(y)) <= 0.85,
        "triangle": (y <= 0.9) & (y >= 2 * abs(x) - 0.95),
        "cross": (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.95),
    }[name]
    return inside.reshape(size, 4, size, 4).mean((1, 3)).astype(np.float32)


def _draw(canvas: np.ndarray, name: str, y: float, x: float, size: int, colour: str) -> None:
    """Draws a shape centred at (y, x) with a thin rim in the opposite brightness, so that it stands out anywhere."""
    rgb = COLOURS[colour]
    rim = (255, 255, 255) if sum(rgb) < 200 else (0, 0, 0)
    for grow, paint_colour in ((2, rim), (0, rgb)):
        mask = _shape(name, size + grow)
        top, left = round(y - (size + grow) / 2), round(x - (size + grow) / 2)
        top = int(np.clip(top, 0, canvas.shape[0] - size - grow))
        left = int(np.clip(left, 0, canvas.shape[1] - size - grow))
        paint(canvas, mask, top, left, paint_colour)


def _canvas(split: Split, rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, str]:
    """A photograph, its contrast lowered a little."""
    photograph, name = background(split, height, width, rng)
    return 128 + rng.uniform(0.5, 0.9) * (photograph - 128), name


def _difficulty(canvas: np.ndarray, size: int) -> float:
    """A small shape on a lively photograph is hard to see; `canvas` is still without it."""
    return float(canvas.std()) / size


def _inside(quarter: int, size: int, rng: np.random.Generator) -> tuple[float, float]:
    """A centre (y, x) in a quarter of a picture of 2 x 2 cells, such that a shape of that size lies in it."""
    room = (CELL - size - 2) / 2
    return CELL * (quarter // 2 + 0.5) + rng.uniform(-room, room), CELL * (quarter % 2 + 0.5) + rng.uniform(-room, room)


def quadrant(split: Split, rng: np.random.Generator) -> Item:
    """In which quarter of the photograph a cross lies."""
    quarter, size = int(rng.integers(4)), int(rng.integers(16, 25))
    canvas, name = _canvas(split, rng, 2 * CELL, 2 * CELL)
    difficulty = _difficulty(canvas, size)
    _draw(canvas, "cross", *_inside(quarter, size, rng), size, str(rng.choice(list(COLOURS))))
    reply = QUARTERS[quarter]
    wrong = tuple(q for q in QUARTERS if q != reply)
    answer = {"kind": "exact", "value": reply}
    return Item(canvas.astype(np.uint8), "Which quarter is the cross in?", reply, answer, wrong, (name,), difficulty)


def shape(split: Split, rng: np.random.Generator) -> Item:
    """Colour and kind of the one shape in the photograph."""
    said_colour, said_shape, size = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), int(rng.integers(20, 29))
    canvas, name = _canvas(split, rng, 2 * CELL, 2 * CELL)
    difficulty = _difficulty(canvas, size)
    _draw(canvas, said_shape, *_inside(int(rng.integers(4)), size, rng), size, said_colour)
    reply = f"{said_colour} {said_shape}"
    other_colour = str(rng.choice([c for c in COLOURS if c != said_colour]))
    other_shape = str(rng.choice([s for s in SHAPES if s != said_shape]))
    wrong = (f"{other_colour} {said_shape}", f"{said_colour} {other_shape}", f"{other_colour} {other_shape}")
    answer = {"kind": "exact", "value": reply}
    return Item(canvas.astype(np.uint8), "What shape is there?", reply, answer, wrong, (name,), difficulty)


def colour(split: Split, rng: np.random.Generator) -> Item:
    """The colour of one of two shapes, which the question names."""
    first, second = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
    asked, other = (str(s) for s in rng.choice(SHAPES, 2, replace=False))
    canvas, name = _canvas(split, rng, 2 * CELL, 2 * CELL)
    quarters = (int(q) for q in rng.choice(4, 2, replace=False))
    difficulties = []
    for kind, said, quarter in zip((asked, other), (first, second), quarters, strict=True):
        size = int(rng.integers(20, 29))
        difficulties.append(_difficulty(canvas, size))
        _draw(canvas, kind, *_inside(quarter, size, rng), size, said)
    wrong = (second, *(c for c in COLOURS if c not in (first, second)))
    answer = {"kind": "exact", "value": first}
    return Item(canvas.astype(np.uint8), f"What colour is the {asked}?", first, answer, wrong, (name,), difficulties[0])


def shape_any(split: Split, rng: np.random.Generator) -> Item:
    """Four shapes of different colours, one in each quarter; naming any one of them is right.

    The demonstration names one at random. A policy that is rewarded for being right, and for nothing else, may settle
    on one quarter; `verify.right_reply` says which of the four a reply names.
    """
    colours = [str(c) for c in rng.choice(list(COLOURS), len(QUARTERS), replace=False)]
    names = [f"{colour} {rng.choice(SHAPES)}" for colour in colours]
    sizes = rng.integers(20, 29, len(names))
    canvas, photograph = _canvas(split, rng, 2 * CELL, 2 * CELL)
    difficulty = _difficulty(canvas, int(sizes.mean()))
    for quarter, (name, size) in enumerate(zip(names, sizes.tolist(), strict=True)):
        said_colour, said_shape = name.split()
        _draw(canvas, said_shape, *_inside(quarter, size, rng), size, said_colour)
    absent = [name for colour in COLOURS for said in SHAPES if (name := f"{colour} {said}") not in names]
    wrong = tuple(str(w) for w in rng.choice(absent, 3, replace=False))
    answer = {"kind": "one_of", "value": names}
    reply = str(rng.choice(names))
    return Item(canvas.astype(np.uint8), "Name any one shape.", reply, answer, wrong, (photograph,), difficulty)


def locate(split: Split, rng: np.random.Generator) -> Item:
    """How far from the left a cross lies, in percent of the width.

    Right within `TOLERANCE`; a demonstration is any whole number within it, as an observer would estimate. Imitation
    must reproduce the spread of the estimates, reward only asks to stay inside.
    """
    percent = int(rng.integers(10, 91))
    canvas, name = _canvas(split, rng, CELL, 3 * CELL)
    place = rng.uniform(10, CELL - 10), percent / 100 * 3 * CELL
    size = int(rng.integers(14, 18))
    difficulty = _difficulty(canvas, size)
    _draw(canvas, "cross", *place, size, str(rng.choice(list(COLOURS))))
    reply = str(int(np.clip(percent + rng.integers(-TOLERANCE, TOLERANCE + 1), 10, 99)))
    far = [p for p in range(10, 100) if abs(p - percent) > 2 * TOLERANCE]
    wrong = tuple(str(p) for p in rng.choice(far, 3, replace=False))
    answer = {"kind": "within", "value": percent, "tolerance": TOLERANCE}
    return Item(canvas.astype(np.uint8), "How far right is the cross?", reply, answer, wrong, (name,), difficulty)
