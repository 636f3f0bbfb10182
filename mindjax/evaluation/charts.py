"""Small pictures as inline SVG: curves, bars and intervals that need no script and no network.

Colours are CSS variables of the page, so that one style sheet decides them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 420, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 26


@dataclass(frozen=True)
class Series:
    """One curve: a name for the legend, x and y of equal length, and a CSS colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


def lines(title: str, series: Sequence[Series], *, x_label: str = "step", zero: bool = False, smooth: int = 0) -> str:
    """Curves on common axes, each drawn faintly as measured and, with `smooth`, strongly as a running mean.

    Args:
      title: above the picture.
      series: curves; those without points are left out.
      x_label: under the picture.
      zero: whether the y axis includes 0.
      smooth: points in the running mean, 0 for none.
    """
    series = [s for s in series if len(s.x)]
    if not series:
        return ""
    xs = [float(x) for s in series for x in s.x]
    ys = [float(y) for s in series for y in s.y if math.isfinite(y)]
    x_ticks = [t for t in ticks(min(xs), max(xs)) if t == int(t)]  # steps are whole
    y_ticks = ticks(min(0.0, *ys) if zero else min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{py(t) + 3.5:.1f}" text-anchor="end">{number(t)}</text>'
        for t in y_ticks
    ]
    parts += [
        f'<text class="tick" x="{px(t):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{number(t)}</text>'
        for t in x_ticks
        if x_low <= t <= x_high
    ]
    for s in series:
        smoothed = running_mean(s.y, smooth) if smooth else list(s.y)
        if smooth:
            parts.append(_polyline(s.x, s.y, px, py, s.colour, "raw"))
        parts.append(_polyline(s.x, smoothed, px, py, s.colour, "curve"))
    names = "".join(
        f'<span><i style="background:{s.colour}"></i>{escape(s.name)}</span>' for s in series if len(series) > 1
    )
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b><span class="legend">{names}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}'
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 1}" text-anchor="end">{escape(x_label)}</text>'
        "</svg></figure>"
    )


def _polyline(x: Sequence[float], y: Sequence[float], px, py, colour: str, kind: str) -> str:  # type: ignore[no-untyped-def]
    # More points than pixels only make the file large.
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), 400)).astype(int))
    points = " ".join(f"{px(x[i]):.1f},{py(y[i]):.1f}" for i in keep if math.isfinite(y[i]))
    return f'<polyline class="{kind}" style="stroke:{colour}" points="{points}"/>'


def running_mean(values: Sequence[float], points: int) -> list[float]:
    """The mean over a centred window that shrinks at both ends."""
    y = np.asarray(values, np.float64)
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(y))])
    index = np.arange(len(y))
    half = np.minimum(np.minimum(index, len(y) - 1 - index), points // 2)
    return ((sums[index + half + 1] - sums[index - half]) / (2 * half + 1)).tolist()


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover low..high, about `count` of them."""
    span = high - low
    if not span > 0:
        span = abs(high) or 1.0
    raw = span / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A number as short as it can be read."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"


def interval(mean: float, low: float, high: float, *, span: float, colour: str) -> str:
    """A point with its interval on an axis from -span to span, 0 marked: for a difference."""
    width, height, middle = 220, 26, 13

    def px(value: float) -> float:
        return width / 2 + max(-1.0, min(1.0, value / span)) * (width / 2 - 6)

    return (
        f'<svg class="interval" viewBox="0 0 {width} {height}" role="img" aria-label="difference">'
        f'<line class="zero" x1="{width / 2}" x2="{width / 2}" y1="2" y2="{height - 2}"/>'
        f'<line style="stroke:{colour}" x1="{px(low):.1f}" x2="{px(high):.1f}" y1="{middle}" y2="{middle}"/>'
        f'<circle style="fill:{colour}" cx="{px(mean):.1f}" cy="{middle}" r="4.5"/></svg>'
    )


def bar(parts: Sequence[tuple[float, str, str]], total: float) -> str:
    """A horizontal bar of (length, CSS colour, title) parts, as a share of `total`."""
    pieces = "".join(
        f'<i style="width:{100 * length / total:.2f}%;background:{colour}" title="{escape(title)}"></i>'
        for length, colour, title in parts
        if length > 0
    )
    return f'<div class="bar">{pieces}</div>'
