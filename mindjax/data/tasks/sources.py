"""The real material behind every picture, and how it is split.

Handwritten digits (scikit-learn, 1,797 glyphs of 8 x 8), photographs and scans (scikit-learn and the scikit-image
wheel) and matplotlib's fonts. Nothing is downloaded. A *source* (one glyph, one photograph, one font) belongs to
exactly one split, so that no held-out picture shares a source with a training picture.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")

# Left and right view of the motorcycle show one scene: only the left one is used.
PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        "skimage/astronaut.png", "skimage/brick.png", "skimage/camera.png", "skimage/coffee.png", "skimage/coins.png",
        "skimage/grass.png", "skimage/hubble_deep_field.jpg", "skimage/ihc.png", "skimage/moon.png",
        "skimage/motorcycle_left.png", "skimage/page.png", "skimage/rocket.jpg", "skimage/cell.png",
        "sklearn/china.jpg",
    ),
    "test": (
        "skimage/chelsea.png", "skimage/gravel.png", "skimage/retina.jpg", "skimage/text.png", "sklearn/flower.jpg",
    ),
}  # fmt: skip
FONTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
        "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralItalic",
        "STIXGeneralBolIta", "cmr10", "cmtt10", "cmb10",
    ),
    "test": ("DejaVuSans-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif-Bold", "STIXGeneralBol", "cmss10"),
}  # fmt: skip
TEST_GLYPHS = 500  # of 1,797
GLYPH_SIZE = 26  # pixels, after upscaling from 8
CELL = 32  # pixels: digits, letters and shapes stand in the cells of a grid, one about the middle of each
_VARIANTS = 6  # slightly rotated, scaled and shifted copies of each training glyph
_CROPS = 150  # of each photograph, at several scales


@dataclass(frozen=True)
class Glyphs:
    """Handwritten digits of one split: `ink` [n, GLYPH_SIZE, GLYPH_SIZE] in 0..1, their `labels` [n] and `ids` [n]."""

    ink: np.ndarray
    labels: np.ndarray
    ids: np.ndarray

    def draw(self, digit: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """A random glyph of this digit, and the name of its source."""
        index = rng.choice(self.by_digit[digit])
        return self.ink[index], f"glyph/{self.ids[index]}"

    @functools.cached_property
    def by_digit(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.labels == digit) for digit in range(10)]


@functools.cache
def glyphs(split: Split) -> Glyphs:
    """The handwritten digits of a split; training glyphs come in several slightly distorted copies."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))  # the split never depends on the experiment's seed
    ids = order[:TEST_GLYPHS] if split == "test" else order[TEST_GLYPHS:]
    ids = np.repeat(ids, 1 if split == "test" else _VARIANTS)
    rng = np.random.default_rng(1)
    strength = 0.0 if split == "test" else 1.0
    angle = strength * rng.uniform(-0.2, 0.2, len(ids))
    scale = 1 + strength * rng.uniform(-0.12, 0.12, (2, len(ids)))
    shift = strength * rng.uniform(-0.3, 0.3, (2, len(ids)))
    # Inverse map: for each output pixel, which place of the 8 x 8 original it shows.
    grid = (np.arange(GLYPH_SIZE) + 0.5) / GLYPH_SIZE * 8 - 4
    y, x = np.meshgrid(grid, grid, indexing="ij")
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    source_y = (cos * y - sin * x) * scale[0][:, None, None] + shift[0][:, None, None] + 3.5
    source_x = (sin * y + cos * x) * scale[1][:, None, None] + shift[1][:, None, None] + 3.5
    ink = _bilinear(np.pad(data.images[ids] / 16.0, ((0, 0), (1, 1), (1, 1))), source_y + 1, source_x + 1)
    return Glyphs(ink.astype(np.float32), data.target[ids], ids)


def _bilinear(images: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Samples [n, H, W] at fractional places [n, h, w], clamped at the border."""
    y, x = np.clip(y, 0, images.shape[1] - 1.001), np.clip(x, 0, images.shape[2] - 1.001)
    y0, x0 = y.astype(int), x.astype(int)
    dy, dx = y - y0, x - x0
    n = np.arange(len(images))[:, None, None]
    top = images[n, y0, x0] * (1 - dx) + images[n, y0, x0 + 1] * dx
    bottom = images[n, y0 + 1, x0] * (1 - dx) + images[n, y0 + 1, x0 + 1] * dx
    return top * (1 - dy) + bottom * dy


def _open(name: str) -> Image.Image:
    package, file = name.split("/")
    if package == "skimage":
        import skimage

        return Image.open(Path(skimage.__file__).parent / "data" / file).convert("RGB")
    import sklearn

    return Image.open(Path(sklearn.__file__).parent / "datasets" / "images" / file).convert("RGB")


@functools.cache
def _crops(split: Split, height: int, width: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Crops [n, height, width, 3] uint8 of the photographs of a split, and the photograph of each."""
    rng = np.random.default_rng(2)
    crops, names = [], []
    for name in PHOTOGRAPHS[split]:
        photograph = _open(name)
        if max(photograph.size) > 640:
            photograph.thumbnail((640, 640))
        for _ in range(_CROPS):
            share = rng.uniform(0.25, 1.0) * min(photograph.width / width, photograph.height / height)
            w, h = share * width, share * height
            x, y = rng.uniform(0, photograph.width - w), rng.uniform(0, photograph.height - h)
            box = (int(x), int(y), int(x + w), int(y + h))
            crops.append(np.asarray(photograph.resize((width, height), Image.Resampling.BILINEAR, box=box)))
            names.append(name)
    return np.stack(crops), tuple(names)


def background(split: Split, height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A random crop of a random photograph: [height, width, 3] float32 in 0..255, and its source.

    Training crops also come mirrored, with other brightness and with their colours exchanged: there are few
    photographs, and a reader should learn what is drawn on them, not them.
    """
    crops, names = _crops(split, height, width)
    index = int(rng.integers(len(crops)))
    crop = crops[index].astype(np.float32)
    if split == "train":
        crop = crop[:: rng.choice((-1, 1)), :: rng.choice((-1, 1)), rng.permutation(3)]
        crop = np.clip(128 + rng.uniform(0.6, 1.2, 3) * (crop - 128) + rng.uniform(-40, 40, 3), 0, 255)
    return crop, f"photograph/{names[index]}"


def clutter(canvas: np.ndarray, ink: np.ndarray) -> float:
    """How much a background [H, W, 3] varies, as a share of how far the ink [3] stands out from its mean."""
    return float(canvas.std() / abs(ink.mean() - canvas.mean()))


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


@functools.cache
def text_mask(text: str, font: str, size: int) -> np.ndarray:
    """The text as a coverage mask [h, w] float32 in 0..1, cut to its ink."""
    face = _font(font, size)
    left, top, right, bottom = face.getbbox(text)
    canvas = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), text, fill=255, font=face)
    return np.asarray(canvas, np.float32) / 255


def paint(canvas: np.ndarray, mask: np.ndarray, top: int, left: int, colour: np.ndarray | tuple[int, ...]) -> None:
    """Blends `colour` over `canvas` [H, W, 3] where `mask` [h, w] is positive, in place."""
    height, width = mask.shape
    assert 0 <= top <= canvas.shape[0] - height and 0 <= left <= canvas.shape[1] - width, "the mask leaves the canvas"
    region = canvas[top : top + height, left : left + width]
    region += mask[..., None] * (np.asarray(colour, np.float32) - region)
