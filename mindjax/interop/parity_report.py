"""`mindjax parity`: runs the comparisons of `parity` and shows them as a table, JSON and a heat map over layers."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from mindjax.interop import parity
from mindjax.interop.parity import Case
from mindjax.interop.parity_rows import Report, Row
from mindjax.interop.random_checkpoint import random_checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Columns of the table and of the heat map: metric, its heading.
COLUMNS = {
    "alone": "alone",
    "alone_truth": "alone, truth",
    "torch_alone_truth": "torch, truth",
    "max": "max",
    "mean": "mean",
    "relative": "carried",
    "truth": "carried, truth",
    "torch_truth": "torch carried, truth",
    "experts": "experts",
}
HEAT = ("alone", "alone_truth", "torch_alone_truth", "relative", "truth", "torch_truth")


@contextmanager
def cases(model_dir: str, models: Sequence[str], backend: str = "cpu") -> Iterator[Iterator[Case]]:
    """The checkpoint of a folder, or a random one per model that lives as long as the context."""
    with tempfile.TemporaryDirectory() as scratch:

        def opened() -> Iterator[Case]:
            if model_dir != "random":
                path = Path(model_dir)
                yield parity.open_case(path, path.resolve().name, pictures=Path(scratch), backend=backend)
                return
            for model in models:
                folder = Path(scratch) / model
                random_checkpoint(folder, moe=model == "moe")
                yield parity.open_case(folder, model, pictures=Path(scratch), random=True, backend=backend)

        yield opened()


def main(arguments: argparse.Namespace) -> int:
    """Returns the exit status: 0 where every bound holds, 1 where one does not."""
    if arguments.model_dir != "random" and not Path(arguments.model_dir).is_dir():
        raise ValueError(f"{arguments.model_dir} is no folder; give a Hugging Face folder, or `random`")
    if arguments.model_dir != "random" and arguments.model:
        raise ValueError("--model chooses among random checkpoints; a folder says by itself what it holds")
    reports: list[Report] = []
    with (
        jax.default_device(_device(arguments.backend)),
        cases(arguments.model_dir, arguments.model or ("dense", "moe"), arguments.backend) as opened,
    ):
        for case in opened:
            for compare in parity.comparisons(arguments.against or ("torch",), arguments.dtype or parity.DTYPES):
                reports.append(compare(case))
                if not arguments.json:
                    print(table(reports[-1]), flush=True)
    if arguments.output is not None:
        write(arguments.output, reports)
    if arguments.json:
        print(json.dumps(summary(reports)))
    else:
        print(verdict(reports))
    return 0 if reports and all(report.passed for report in reports) else 1


def _device(backend: str) -> jax.Device:
    try:
        return jax.devices(backend)[0]
    except RuntimeError as error:
        raise ValueError(f"--backend {backend}: JAX has no such device here ({error})") from error


def summary(reports: Sequence[Report]) -> dict[str, Any]:
    return {
        "passed": all(report.passed for report in reports),
        "reports": [report.as_dict() for report in reports],
    }


def verdict(reports: Sequence[Report]) -> str:
    """One line per report."""
    lines = []
    for report in reports:
        end = "within all bounds" if report.passed else f"departs first at {report.first_departure}"
        lines.append(f"{report.model} {report.dtype} against {report.against}: {end}")
    return "\n".join(lines)


def write(folder: Path, reports: Sequence[Report]) -> None:
    """parity.json, parity.txt and a heat map for each model, parity-MODEL.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parity.json").write_text(json.dumps(summary(reports), indent=1) + "\n")
    (folder / "parity.txt").write_text("\n".join([*map(table, reports), verdict(reports)]) + "\n")
    for model in dict.fromkeys(report.model for report in reports):
        layered = [report for report in reports if report.model == model and report.layers]
        if layered:
            heat_map(layered).savefig(folder / f"parity-{model}.png", dpi=110)


# ---- the table


def table(report: Report) -> str:
    """The rows of one report; a row past a bound is marked and says which."""
    lines = [f"{report.model}, {report.dtype}, against {report.against}"]
    operations = [row for row in report.layers if not row.where.startswith("product.")]
    if operations:
        columns = [key for key in COLUMNS if any(key in row.metrics for row in operations)]
        cells = [[COLUMNS[key] for key in columns]]
        cells += [[_number(row.metrics.get(key)) for key in columns] for row in operations]
        lines += _aligned(["operation", *(row.where for row in operations)], cells, ["bound", *map(_bound, operations)])
    for row in (*(row for row in report.layers if row.where.startswith("product.")), *report.ends):
        numbers = "  ".join(f"{key} {_number(value)}" for key, value in row.metrics.items())
        lines.append(f"  {row.where:<22}  {numbers}  {_bound(row)}".rstrip())
    return "\n".join([*lines, ""])


def _aligned(names: list[str], cells: list[list[str]], ends: list[str]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for name, row, end in zip(names, cells, ends, strict=True):
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {name:<22}  {numbers}  {end}".rstrip()


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == 0 or 0.01 <= abs(value) <= 1000:
        return f"{value:.4g}"
    return f"{value:.1e}"


def _bound(row: Row) -> str:
    told = [
        f"{'' if bound.holds(row.metrics) else 'PAST '}{bound.metric} {'>=' if bound.at_least else '<='} "
        f"{_number(bound.limit)} ({bound.source})"
        for bound in row.bounds
    ]
    return ", ".join(told)


# ---- the picture


def heat_map(reports: Sequence[Report]) -> Figure:
    """Errors as colours, operations down and metrics across, one panel per precision; rows past a bound are framed."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    names = [row.where for row in reports[0].layers if not row.where.startswith("product.")]
    figure = Figure(figsize=(2.4 + 2.9 * len(reports), 1.6 + 0.2 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    image: Any = None
    for axis, report in zip(axes, reports, strict=True):
        rows = {row.where: row for row in report.layers}
        # 0 is the same bits, drawn at the lower end of the scale.
        values = [[max(rows[name].metrics.get(key, math.nan), 1e-9) for key in HEAT] for name in names]
        image = axis.imshow(values, norm=LogNorm(1e-7, 1e-1), cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set_title(report.dtype, fontsize=11)
        axis.set_xticks(range(len(HEAT)), [COLUMNS[key] for key in HEAT], rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                if not math.isnan(value):
                    text = "0" if value <= 1e-9 else f"{value:.0e}".replace("e-0", "e-")
                    color = "black" if value > 1e-3 else "white"
                    axis.text(x, y, text, ha="center", va="center", fontsize=5.5, color=color)
        for y, name in enumerate(names):
            if not rows[name].passed:
                axis.add_patch(Rectangle((-0.5, y - 0.5), len(HEAT), 1, fill=False, edgecolor="red", linewidth=1.8))
    figure.suptitle(f"{reports[0].model} against {reports[0].against}: ||difference|| / ||reference||", fontsize=12)
    figure.colorbar(image, ax=list(axes), shrink=0.6, label="relative error")
    return figure
