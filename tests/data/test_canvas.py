"""Digits on cards in large pictures: seen where from afar, read from near."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mindjax.data import tasks
from mindjax.data.tasks.canvas import CANVAS, CARD, MARGIN, digit_canvas
from mindjax.data.tasks.item import Item
from mindjax.data.tasks.sources import Split
from mindjax.data.tasks.verify import is_right


def items(split: Split, count: int, seed: int = 0) -> list[Item]:
    return [digit_canvas(split, np.random.default_rng((seed, i))) for i in range(count)]


def shrunk(item: Item, side: int) -> np.ndarray:
    """[side, side, 3] float64."""
    assert item.image is not None
    return np.asarray(Image.fromarray(item.image).resize((side, side), Image.Resampling.BICUBIC), np.float64)


def colourfulness(pixels: np.ndarray) -> np.ndarray:
    return pixels.max(axis=2) - pixels.min(axis=2)


def test_the_box_is_the_cards() -> None:
    for item in items("test", 20):
        left, top, right, bottom = item.answer["box"]
        assert (right - left, bottom - top) == (CARD, CARD)
        assert min(left, top) >= MARGIN and max(right, bottom) <= CANVAS - MARGIN
        assert item.image is not None and item.image.shape == (CANVAS, CANVAS, 3)
        coloured = colourfulness(item.image.astype(np.float64)) > 60
        inside = np.zeros_like(coloured)
        inside[top:bottom, left:right] = True
        assert not coloured[~inside].any() and coloured[inside].mean() > 0.4
        assert is_right(item.answer, item.reply)


def test_the_place_is_seen_from_afar() -> None:
    """In 32 x 32 pixels the most colourful spot is the card, to within half of it."""
    for item in items("test", 40):
        left, top, right, bottom = item.answer["box"]
        row, column = np.unravel_index(np.argmax(colourfulness(shrunk(item, 32))), (32, 32))
        y, x = (row + 0.5) * CANVAS / 32, (column + 0.5) * CANVAS / 32
        assert abs(x - (left + right) / 2) <= CARD / 2 and abs(y - (top + bottom) / 2) <= CARD / 2


def test_the_digit_is_read_from_near_alone() -> None:
    """A classifier that is told where the card is reads held-out glyphs from full resolution, and from 32 or 45 pixels
    a side hardly better than chance."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    train, test = items("train", 300), items("test", 100, seed=1)
    near: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {name: ([], []) for name in ("32", "45", "full")}
    for place, drawn in enumerate((train, test)):
        for item in drawn:
            left, top, right, bottom = item.answer["box"]
            assert item.image is not None
            card = item.image[top:bottom, left:right].astype(np.float64)
            ink = np.abs(card - np.median(card.reshape(-1, 3), axis=0)).mean(axis=2)
            # Aligned to its ink, as far as a reader could.
            rows, columns = np.nonzero(ink > 60)
            ink = np.roll(ink, (-rows.min(), -columns.min()), (0, 1))[:13, :13]
            near["full"][place].append(ink.ravel())
            for side in (32, 45):
                scale = side / CANVAS
                size = int(CARD * scale) + 2
                view = np.pad(shrunk(item, side), ((0, size), (0, size), (0, 0)))
                part = view[int(top * scale) :, int(left * scale) :][:size, :size]
                part = np.abs(part - np.median(part.reshape(-1, 3), axis=0)).mean(axis=2)
                near[str(side)][place].append(part.ravel())
    scores = {}
    for name, (known, new) in near.items():
        forest = ensemble.ExtraTreesClassifier(60, random_state=0).fit(known, [item.reply for item in train])
        scores[name] = forest.score(new, [item.reply for item in test])
    assert scores["full"] > 0.85 and scores["32"] < 0.25 and scores["45"] < 0.4, scores


def test_it_is_a_family() -> None:
    samples = tasks.build("digit_canvas", "train", 30, 0)
    assert len({sample.messages[-1]["content"] for sample in samples}) >= 6
    assert all(sample.answer is not None and sample.answer["box"] for sample in samples)
