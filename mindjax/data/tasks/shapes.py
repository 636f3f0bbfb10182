"""Families about shapes and markers drawn over photographs."""

from __future__ import annotations

import functools

import numpy as np

from mindjax.data.tasks.item import Item
from mindjax.data.tasks.sources import Split, background, paint

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 215, 30),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
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


def quadrant(split: Split, rng: np.random.Generator) -> Item:
    """In which quarter of the photograph a cross lies."""
    row, column = int(rng.integers(2)), int(rng.integers(2))
    canvas, name = _canvas(split, rng, 64, 64)
    y, x = 32 * row + rng.uniform(9, 23), 32 * column + rng.uniform(9, 23)
    _draw(canvas, "cross", y, x, int(rng.integers(14, 19)), str(rng.choice(list(COLOURS))))
    reply = QUARTERS[2 * row + column]
    wrong = tuple(q for q in QUARTERS if q != reply)
    answer = {"kind": "exact", "value": reply}
    return Item(canvas.astype(np.uint8), "Which quarter is the cross in?", reply, answer, wrong, (name,))


def colour(split: Split, rng: np.random.Generator) -> Item:
    """The colour of one of two shapes."""
    first, second = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
    asked, other = (str(s) for s in rng.choice(SHAPES, 2, replace=False))
    canvas, name = _canvas(split, rng, 64, 64)
    for shape, shape_colour, quarter in zip((asked, other), (first, second), rng.choice(4, 2, replace=False), strict=True):
        _draw(canvas, shape, *_inside(quarter, rng), int(rng.integers(15, 21)), shape_colour)
    wrong = (second, *(c for c in COLOURS if c not in (first, second)))
    answer = {"kind": "exact", "value": first}
    return Item(canvas.astype(np.uint8), f"What colour is the {asked}?", first, answer, wrong, (name,))


def _inside(quarter: int, rng: np.random.Generator) -> tuple[float, float]:
    """A centre (y, x) in a quarter of a 64 x 64 picture."""
    return 32 * (quarter // 2) + rng.uniform(12, 20), 32 * (quarter % 2) + rng.uniform(12, 20)


def describe(split: Split, rng: np.random.Generator) -> Item:
    """What shapes there are and where, in reading order: much to learn from one picture."""
    quarters = sorted(int(q) for q in rng.choice(4, 2, replace=False))
    colours = [str(c) for c in rng.choice(list(COLOURS), 2, replace=False)]
    shapes = [str(s) for s in rng.choice(SHAPES, 2, replace=False)]
    canvas, name = _canvas(split, rng, 64, 64)
    for quarter, shape_colour, shape in zip(quarters, colours, shapes, strict=True):
        _draw(canvas, shape, *_inside(quarter, rng), int(rng.integers(15, 21)), shape_colour)

    def tell(quarters: list[int], colours: list[str], shapes: list[str]) -> str:
        return ", ".join(f"{c} {s} {QUARTERS[q]}" for q, c, s in zip(quarters, colours, shapes, strict=True))

    reply = tell(quarters, colours, shapes)
    absent = str(rng.choice([c for c in COLOURS if c not in colours]))
    wrong = (tell(quarters, colours[::-1], shapes), tell(quarters, colours, shapes[::-1]),
             tell(quarters, [colours[0], absent], shapes))  # fmt: skip
    return Item(canvas.astype(np.uint8), "Describe the shapes.", reply, {"kind": "exact", "value": reply}, wrong, (name,))


def relation(split: Split, rng: np.random.Generator) -> Item:
    """Where one shape lies, seen from the other."""
    reply = str(rng.choice(list(DIRECTIONS)))
    asked, other = (str(s) for s in rng.choice(SHAPES, 2, replace=False))
    canvas, name = _canvas(split, rng, 64, 64)
    dy, dx = DIRECTIONS[reply]
    distance = rng.uniform(22, 30)
    # Off the axis by little, so that one direction clearly dominates.
    off = rng.uniform(-6, 6)
    half_y, half_x = (dy * distance + (off if dy == 0 else 0)) / 2, (dx * distance + (off if dx == 0 else 0)) / 2
    middle_y = rng.uniform(12 + abs(half_y), 52 - abs(half_y))
    middle_x = rng.uniform(12 + abs(half_x), 52 - abs(half_x))
    for shape, sign in ((asked, 1), (other, -1)):
        _draw(canvas, shape, middle_y + sign * half_y, middle_x + sign * half_x, int(rng.integers(14, 19)),
              str(rng.choice(list(COLOURS))))  # fmt: skip
    wrong = tuple(d for d in DIRECTIONS if d != reply)
    question = f"Where is the {asked} from the {other}?"
    return Item(canvas.astype(np.uint8), question, reply, {"kind": "exact", "value": reply}, wrong, (name,))


def locate(split: Split, rng: np.random.Generator) -> Item:
    """How far from the left a cross lies, in percent of the width.

    Right within `TOLERANCE`; a demonstration is any whole number within it, as an observer would estimate. Imitation
    must reproduce the spread of the estimates, reward only asks to stay inside.
    """
    percent = int(rng.integers(10, 91))
    canvas, name = _canvas(split, rng, 32, 96)
    _draw(canvas, "cross", rng.uniform(9, 23), percent / 100 * 96, int(rng.integers(13, 18)), str(rng.choice(list(COLOURS))))
    reply = str(int(np.clip(percent + rng.integers(-TOLERANCE, TOLERANCE + 1), 10, 99)))
    far = [p for p in range(10, 100) if abs(p - percent) > 2 * TOLERANCE]
    wrong = tuple(str(p) for p in rng.choice(far, 3, replace=False))
    answer = {"kind": "within", "value": percent, "tolerance": TOLERANCE}
    return Item(canvas.astype(np.uint8), "How far right is the cross?", reply, answer, wrong, (name,))
