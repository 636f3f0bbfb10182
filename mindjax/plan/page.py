"""A plan as one offline HTML page: memory against what there is, where the time goes, how the mesh lies."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mindjax.evaluation.style import CSS
from mindjax.plan.roofline import Prediction

COLOURS = ("#2457c5", "#d07a14", "#16805a", "#b0309a", "#c2412d", "#0d8fa8", "#7a4fd0", "#6b7385")
GIB = 2**30


def write(
    path: Path, *, facts: Mapping[str, Any], memory: Mapping[str, Mapping[str, float]], hbm: float,
    predictions: Mapping[str, Prediction], sizes: Mapping[str, int], mesh: np.ndarray, notes: Sequence[str],
) -> None:  # fmt: skip
    """Writes the page.

    Args:
      path: of the file.
      facts: name -> what to say, in a table at the top.
      memory: who says so -> kind -> bytes.
      hbm: bytes that a device has.
      predictions: who says so -> times.
      sizes: mesh axis -> size.
      mesh: [*sizes, dimensions] coordinates of the devices.
      notes: paragraphs below the numbers.
    """
    rows = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    main = next(iter(predictions.values()))
    longest = "".join(
        f"<tr><th>{escape(name)}</th><td>{seconds:.3f} s</td><td>{seconds / main.step:.0%}</td></tr>"
        for name, seconds in main.slowest
    )
    assumed = "".join(f"<li>{escape(text)}</li>" for text in main.assumptions)
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    body = (
        f"<header><h1>{escape(str(facts['model']))} on {escape(str(facts['topology']))}</h1></header>"
        f'<section><div class="scroll"><table class="facts">{rows}</table></div>{said}</section>'
        "<section><h2>Memory of a device</h2><p>Against what a program may use.</p>"
        f"{_image(memory_picture(memory, hbm), 'Memory of a device by kind')}</section>"
        "<section><h2>Where a step's time goes</h2><p>Each limit alone, and the step that follows from all.</p>"
        f"{_image(time_picture(predictions), 'Roofline')}</section>"
        "<section><h2>How the mesh lies on the machine</h2><p>One picture for each axis: devices of one colour are one "
        f"group, and exchange along that axis.</p>{_image(mesh_picture(sizes, mesh), 'The mesh')}</section>"
        f'<section><h2>The longest parts</h2><div class="scroll"><table>{longest}</table></div></section>'
        f"<section><h2>Assumptions</h2><ul>{assumed}</ul></section>"
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>mindjax plan · {escape(str(facts['model']))}</title><style>{CSS}\nimg{{max-width:100%}}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, path)


def memory_picture(memory: Mapping[str, Mapping[str, float]], hbm: float) -> Any:
    """Bars of kinds, one for each source, and a line where the memory ends."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.6 * len(memory)), layout="constrained")
    kinds = list(dict.fromkeys(kind for parts in memory.values() for kind, size in parts.items() if size > 0.002 * hbm))
    for row, parts in enumerate(memory.values()):
        left = 0.0
        for number, kind in enumerate(kinds):
            size = parts.get(kind, 0.0) / GIB
            axes.barh(
                row,
                size,
                left=left,
                color=COLOURS[number % len(COLOURS)],
                height=0.6,
                alpha=1 - 0.4 * (number // len(COLOURS)),
            )
            left += size
    for number, kind in enumerate(kinds):
        axes.barh(0, 0, color=COLOURS[number % len(COLOURS)], label=kind, alpha=1 - 0.4 * (number // len(COLOURS)))
    axes.axvline(hbm / GIB, color="#c2412d", lw=2)
    axes.annotate(f"{hbm / GIB:.0f} GiB", (hbm / GIB, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -10),
                  textcoords="offset points", color="#c2412d", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(memory)), list(memory))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(hbm / GIB, max(sum(parts.values()) / GIB for parts in memory.values())))
    axes.set_xlabel("GiB")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    _plain(axes)
    return figure


def time_picture(predictions: Mapping[str, Prediction]) -> Any:
    """Bars of seconds: products at peak, memory at bandwidth, exchanges by axis, and the step."""
    from matplotlib import pyplot

    axes_of = list(dict.fromkeys(axis for p in predictions.values() for axis in p.links))
    names = ["compute", "memory", "kernels", *(f"exchanges: {axis}" for axis in axes_of), "step"]
    figure, axes = pyplot.subplots(figsize=(9, 1.0 + 0.28 * len(names) * len(predictions)), layout="constrained")
    height = 0.8 / len(predictions)
    for number, (source, p) in enumerate(predictions.items()):
        values = [p.compute, p.memory, p.kernels, *(p.links.get(axis, 0.0) for axis in axes_of), p.step]
        places = np.arange(len(names)) + number * height
        bars = axes.barh(places, values, height=height, color=COLOURS[number], label=source)
        axes.bar_label(bars, [f"{value:.3g} s" for value in values], padding=3, fontsize=7)
    axes.set_yticks(np.arange(len(names)) + height * (len(predictions) - 1) / 2, names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.margins(x=0.12)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _plain(axes)
    return figure


def mesh_picture(sizes: Mapping[str, int], mesh: np.ndarray) -> Any:
    """The machine once for each axis with more than one device, its groups coloured.

    Args:
      sizes: mesh axis -> size.
      mesh: [*sizes, dimensions] coordinates of the devices.
    """
    from matplotlib import pyplot

    shown = [axis for axis, size in sizes.items() if size > 1] or list(sizes)[:1]
    dimensions = mesh.shape[-1]
    figure = pyplot.figure(figsize=(3.2 * len(shown), 3.1), layout="constrained")
    flat = mesh.reshape(-1, dimensions)
    for number, axis in enumerate(shown):
        place = list(sizes).index(axis)
        count = flat.shape[0] // mesh.shape[place]
        others = [size for i, size in enumerate(mesh.shape[:-1]) if i != place]
        numbers = np.expand_dims(np.arange(count).reshape(others), place)
        groups = np.broadcast_to(numbers, mesh.shape[:-1]).reshape(-1)
        colours = [COLOURS[group % len(COLOURS)] for group in groups]
        if dimensions == 3:
            axes: Any = figure.add_subplot(1, len(shown), number + 1, projection="3d")
            axes.scatter(*flat.T, c=colours, s=max(4, 400 / len(flat) ** 0.7), depthshade=False)
            axes.set_zticks([])
        else:
            axes = figure.add_subplot(1, len(shown), number + 1)
            axes.scatter(flat[:, -1], flat[:, 0], c=colours, s=max(6, 900 / len(flat) ** 0.8), marker="s")
            axes.invert_yaxis()
            for side in axes.spines.values():
                side.set_visible(False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{axis} = {mesh.shape[place]}", fontsize=9)
    return figure


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(labelsize=8)


def _image(figure: Any, title: str) -> str:
    from matplotlib import pyplot

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<figure class="chart"><img alt="{escape(title)}" src="data:image/png;base64,{encoded}"></figure>'
