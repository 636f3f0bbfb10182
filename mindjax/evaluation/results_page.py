"""The page of a comparison job: tables with paired intervals and pictures, as Markdown and as one offline HTML file.

It is made from what the runs left on disk, whatever made them: `summary.json`, and of each run `metrics.jsonl`,
`middle.jsonl` and `end.jsonl` with its replies to held-out items, and `result.json`.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mindjax.evaluation import draws
from mindjax.evaluation.charts import running_mean
from mindjax.evaluation.statistics import Interval, paired_bootstrap
from mindjax.evaluation.style import CSS
from mindjax.train.metrics import read_metrics

START = "start"
COLOURS = ("#2457c5", "#d07a14", "#16805a", "#b0309a", "#c2412d", "#0d8fa8", "#7a4fd0", "#6b7385")


@dataclass(frozen=True)
class Measure:
    """A number with how it is written: its name, its unit, decimals, and what it is multiplied with first."""

    label: str
    decimals: int = 2
    scale: float = 1.0
    exponent: bool = False

    def text(self, value: float, *, sign: bool = False) -> str:
        plus, kind = "+" if sign else "", "e" if self.exponent else "f"
        text = f"{self.scale * value:{plus}.{self.decimals}{kind}}"
        return text.lstrip("+-") if not float(text) and not self.exponent else text


# Of a record of `end.jsonl`, one number per item.
PER_ITEM: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "greedy": lambda item: item["greedy"],
    "pass@1": lambda item: float(np.mean(item["right"])),
    "pass@n": lambda item: max(item["right"]),
    "distinct": lambda item: item["distinct"],
    "entropy": lambda item: float(np.mean(item["surprise"])),
    "length": lambda item: float(np.mean(item["tokens"])),
    "not stopped": lambda item: float(np.mean([reason != "stop" for reason in item["finish"]])),
    "invented": lambda item: 1.0 - item["greedy"],
    "invented, T = 1": lambda item: 1.0 - float(np.mean(item["right"])),
}
MEASURES = {
    "greedy": Measure("accuracy, greedy, %", 1, 100),
    "pass@1": Measure("pass@1, %", 1, 100),
    "pass@n": Measure("pass@n, %", 1, 100),
    "distinct": Measure("different right replies"),
    "entropy": Measure("entropy of a reply, nats"),
    "length": Measure("tokens in a reply", 1),
    "not stopped": Measure("cut replies, %", 1, 100),
    "invented": Measure("invented without a picture, greedy, %", 1, 100),
    "invented, T = 1": Measure("invented without a picture, T = 1, %", 1, 100),
}
# Of `metrics.jsonl`, the mean over the steps; of seconds the median.
TRAINING = {
    "reward": Measure("reward", 3),
    "pass@1": Measure("pass@1 of rollouts, %", 1, 100),
    "informative": Measure("asked groups with a lesson, %", 1, 100),
    "trained_informative": Measure("trained groups with a lesson, %", 1, 100),
    "oversample": Measure("prompts asked for each trained"),
    "entropy": Measure("entropy of a token, nats", 3),
    "length": Measure("tokens in a rollout", 1),
    "cut": Measure("rollouts cut by length, %", 1, 100),
    "redundant": Measure("rollouts cut for circles, %", 1, 100),
    "rollout_kl": Measure("divergence (k3)", 1, exponent=True),
    "rollout_pearson": Measure("Pearson r of log-probs", 5),
    "rollout_max": Measure("largest difference of a log-prob", 3),
    "off_policy_weight": Measure("mean weight", 4),
    "rollout_seconds": Measure("rollout, s a step", 3),
    "update_seconds": Measure("update, s a step", 3),
}


@dataclass(frozen=True)
class Column:
    """A column of a comparison's table.

    Attributes:
      measure: a name of `PER_ITEM`, or of `metrics.jsonl` where `on` is "training".
      on: which held-out items, or "training" for the mean over a run's steps; of seconds it is the median.
      at: the end of a run or the middle of its steps.
      families: "all", "single" or "several", as the families have one or several right replies, or a family's name.
      label: over the column; "" is the measure's own.
    """

    measure: str
    on: Literal["plain", "ablated", "think", "training"] = "plain"
    at: Literal["end", "middle"] = "end"
    families: str = "all"
    label: str = ""

    def __post_init__(self) -> None:
        known = TRAINING if self.on == "training" else PER_ITEM
        if self.measure not in known:
            raise ValueError(
                f"results: there is no measure {self.measure!r} on {self.on}: it can be {', '.join(known)}"
            )

    @property
    def kind(self) -> Measure:
        return (TRAINING if self.on == "training" else MEASURES)[self.measure]


def means(folder: Path, measure: str, on: str = "plain") -> dict[str, float]:
    """The mean of a measure over the held-out items of each family, at the end of the run in `folder`."""
    items = [item for item in draws.read(folder / "end.jsonl") if item["set"] == on]
    if not items:
        items = draws.read(folder / "end.jsonl")
    families = dict.fromkeys(item["task"] for item in items)
    return {f: float(np.mean([PER_ITEM[measure](i) for i in items if i["task"] == f])) for f in families}


@dataclass(frozen=True)
class Files:
    """A job's directory, read.

    Attributes:
      folder: the job's.
    """

    folder: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def run(self, arm: str, seed: int) -> Path:
        return self.folder / (START if arm == START else f"runs/{arm}-{seed}")

    def seeds(self, arms: Sequence[str]) -> list[int]:
        """Those for which all of the arms are finished."""
        done = [s for s in self.summary["seeds"] if all((self.run(a, s) / "result.json").exists() for a in arms)]
        return done

    def title(self, arm: str) -> str:
        return "before" if arm == START else self.summary["arms"][arm]["title"]

    def values(self, arm: str, seed: int, column: Column) -> list[float]:
        """One number per held-out item, or one of all steps; [] where the run does not have it."""
        folder = self.run(arm, seed)
        if column.on == "training":
            steps = [record[column.measure] for record in read_metrics(folder) if column.measure in record]
            # A step that compiles takes a hundred times as long as the others.
            middle = np.median if column.measure.endswith("_seconds") else np.mean
            return [float(middle(steps))] if steps else []
        wanted = {
            "all": (*self.summary["families"], *self.summary["several"]),
            "single": tuple(self.summary["families"]),
            "several": tuple(self.summary["several"]),
        }.get(column.families, (column.families,))
        at = "end" if arm == START else column.at
        items = [i for i in draws.read(folder / f"{at}.jsonl") if i["set"] == column.on and i["task"] in wanted]
        return [float(PER_ITEM[column.measure](item)) for item in items]

    def cell(self, arm: str, reference: str, seeds: Sequence[int], column: Column) -> Cell | None:
        """An arm's mean, those of its seeds, and its difference to the reference; None without numbers."""
        mine = [self.values(arm, seed, column) for seed in seeds]
        if not seeds or not all(mine):
            return None
        by_seed = tuple(float(np.mean(values)) for values in mine)
        theirs = [self.values(reference, seed, column) for seed in seeds]
        paired = arm != reference and [len(v) for v in mine] == [len(v) for v in theirs]
        return Cell(by_seed, paired_bootstrap(mine, theirs) if paired else None)


@dataclass(frozen=True)
class Cell:
    """A place in a table: means of the seeds, and the paired difference to the reference arm."""

    by_seed: tuple[float, ...]
    difference: Interval | None

    @property
    def mean(self) -> float:
        return float(np.mean(self.by_seed))


@dataclass(frozen=True)
class Section:
    """What the page shows of one comparison."""

    name: str
    title: str
    question: str
    arms: dict[str, str]
    seeds: list[int]
    columns: list[Column]
    cells: dict[str, list[Cell | None]]
    curves: tuple[str, ...]
    analysis: list[str]


def write(folder: Path, analysis: str = "", publish: str = "") -> Path:
    """Writes `results.md`, its pictures in `images`, and `report.html`; returns the path of the last.

    Args:
      folder: of the job.
      analysis: a Markdown file with a section `## name` of plain paragraphs for a comparison; may be missing.
      publish: a folder that gets a copy of `results.md` and its pictures; "" for none.
    """
    files = Files(folder)
    notes = _analysis(Path(analysis)) if analysis else {}
    sections = [_section(files, name, notes.get(name, [])) for name in files.summary["comparisons"]]
    (folder / "images").mkdir(exist_ok=True)
    pictures = {section.name: _picture(files, section) for section in sections if section.seeds}
    _put(folder / "results.md", _markdown(files, sections, pictures, notes.get("", [])))
    _put(folder / "report.html", _html(files, sections, pictures, notes.get("", [])))
    if publish:
        (Path(publish) / "images").mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "results.md", Path(publish) / "results.md")
        for picture in pictures.values():
            shutil.copy(picture, Path(publish) / "images" / picture.name)
    return folder / "report.html"


def _section(files: Files, name: str, analysis: list[str]) -> Section:
    spec = files.summary["comparisons"][name]
    arms = {arm: files.title(arm) for arm in spec["arms"]}
    seeds = files.seeds(list(arms))
    columns = [Column(**column) for column in spec["columns"]]
    cells = {arm: [files.cell(arm, spec["arms"][0], seeds, column) for column in columns] for arm in arms}
    return Section(name, spec["title"], spec["question"], arms, seeds, columns, cells, tuple(spec["curves"]), analysis)


def _analysis(path: Path) -> dict[str, list[str]]:
    """Paragraphs by section; those before the first section under ""."""
    result: dict[str, list[str]] = {}
    name = ""
    for block in path.read_text().split("\n\n") if path.exists() else []:
        text = block.strip()
        if text.startswith("## "):
            name, _, text = text[3:].partition("\n")
            name = name.strip()
        if text.strip():
            result.setdefault(name, []).append(text.strip())
    return result


# As text


def _intro(files: Files) -> list[str]:
    summary = files.summary
    start = json.loads((files.folder / START / "result.json").read_text())
    runs = [files.run(arm, seed) / "result.json" for arm in summary["arms"] for seed in summary["seeds"]]
    results = [json.loads(path.read_text()) for path in runs if path.exists()]
    seconds = [result["train_seconds"] for result in results if not result["resumed"]] or [0.0]
    # Of a resumed stage only the time since then is known.
    took = "" if start["resumed"] else f", {start['train_seconds']:.0f} s"
    base = summary["base"]
    return [
        f"One SFT checkpoint ({start['parameters'] / 1e6:.2f} M parameters, {start['steps']:,} steps on "
        f"{start['samples']:,} demonstrations{took}), then {len(results)} runs from it: "
        f"{len(summary['arms'])} arms, seeds {', '.join(map(str, summary['seeds']))}. A run of GSPO has "
        f"{base['steps']} steps of {base['prompts_per_step']} prompts with {base['samples_per_prompt']} replies each. "
        "It differs from the base recipe in what its arm says and nothing else: all arms of a comparison have the same "
        f"steps, prompts and rollouts. Training took {np.mean(seconds):.0f} s a run on average and {max(seconds):.0f} "
        f"s at most, {summary['workers']} side by side on {summary['cores']} cores.",
        f"Judged on {summary['held_out']} held-out items of each family: glyphs, photographs and fonts that no "
        f"training item shows. Greedy accuracy, and {summary['samples']} replies at temperature 1 with the same random "
        "numbers for all arms. A second line of a cell is the difference to the first arm of the table with its paired "
        "95 % bootstrap interval over seeds and, inside a seed, items; it is bold where the interval excludes 0. With "
        "so few seeds the intervals are rough, and the one checkpoint is not varied. Measures of training are means "
        "over a run's steps, paired over seeds alone.",
    ]


def _starting(files: Files) -> list[tuple[str, list[str]]]:
    """Rows of the table of the model that all start from."""
    folder, rows = files.run(START, 0), []
    measures = ("greedy", "pass@1", "pass@n", "distinct", "entropy")
    found = {measure: means(folder, measure) for measure in measures}
    invented = means(folder, "invented", "ablated")
    for family in (*files.summary["families"], *files.summary["several"]):
        cells = [MEASURES[measure].text(found[measure][family]) for measure in measures]
        rows.append((family, [*cells, MEASURES["invented"].text(invented[family])]))
    return [("family", [MEASURES[measure].label for measure in (*measures, "invented")]), *rows]


def _label(section: Section, column: Column) -> str:
    where = {"all": "", "single": "one right reply", "several": "several right replies"}
    words = [column.label or column.kind.label]
    family = where.get(column.families, column.families)
    if family and not column.label:
        words.append(family)
    if column.at == "middle" and not column.label:
        words.append("middle")
    return ", ".join(words)


def _difference(column: Column, cell: Cell) -> str:
    if cell.difference is None:
        return ""
    d = cell.difference
    mean, low, high = (column.kind.text(v, sign=True) for v in (d.mean, d.low, d.high))
    return f"{mean} ({low} to {high})"


def _markdown(files: Files, sections: Sequence[Section], pictures: Mapping[str, Path], closing: Sequence[str]) -> str:
    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    head, *rows = _starting(files)
    lines = [
        "# What each part of the RL stage does", "", "Written by `mindjax results`; do not edit.", "",
        *(line for paragraph in (*_intro(files), *closing) for line in (paragraph, "")),
        "## Where all runs start", "", row([head[0], *head[1]]), row(["---"] * (len(head[1]) + 1)),
        *(row([name, *cells]) for name, cells in rows), "",
    ]  # fmt: skip
    for section in sections:
        lines += [f"## {section.title}", "", section.question, ""]
        if not section.seeds:
            lines += ["Not run yet.", ""]
            continue
        lines += [
            row(["arm", *(_label(section, c) for c in section.columns)]),
            row(["---"] * (len(section.columns) + 1)),
        ]
        for arm, title in section.arms.items():
            cells = []
            for column, cell in zip(section.columns, section.cells[arm], strict=True):
                text = "" if cell is None else column.kind.text(cell.mean)
                if cell is not None and cell.difference is not None:
                    bold = "**" if cell.difference.excludes_zero else ""
                    text += f"<br>{bold}{_difference(column, cell)}{bold}"
                cells.append(text)
            lines.append(row([title, *cells]))
        lines += ["", f"![{section.title}](images/{pictures[section.name].name})", ""]
        lines += [line for paragraph in section.analysis for line in (paragraph, "")]
    return "\n".join(lines).rstrip() + "\n"


def _html(files: Files, sections: Sequence[Section], pictures: Mapping[str, Path], closing: Sequence[str]) -> str:
    head, *rows = _starting(files)
    body = [
        "<header><h1>What each part of the RL stage does</h1>"
        + "".join(f"<p class=lead>{escape(paragraph)}</p>" for paragraph in (*_intro(files), *closing))
        + "</header>",
        f"<section><h2>Where all runs start</h2>{_table(head, rows)}</section>",
    ]
    for section in sections:
        shown = ""
        if section.seeds:
            table = []
            for arm, title in section.arms.items():
                cells = []
                for column, cell in zip(section.columns, section.cells[arm], strict=True):
                    sure = cell is not None and cell.difference is not None and cell.difference.excludes_zero
                    note = "" if cell is None else escape(_difference(column, cell))
                    small = f"<small>{'<b>' * sure}{note}{'</b>' * sure}</small>" if note else ""
                    cells.append(("" if cell is None else column.kind.text(cell.mean)) + small)
                table.append((title, cells))
            data = base64.b64encode(pictures[section.name].read_bytes()).decode()
            shown = _table(("arm", [_label(section, c) for c in section.columns]), table, raw=True)
            shown += f'<p><img alt="{escape(section.title)}" src="data:image/png;base64,{data}"></p>'
        body.append(
            f"<section><h2>{escape(section.title)}</h2><p>{escape(section.question)}</p>{shown or 'Not run yet.'}"
            + "".join(f"<p class=said>{escape(paragraph)}</p>" for paragraph in section.analysis)
            + "</section>"
        )
    extra = (
        "section img{width:100%;background:#fff;border-radius:12px;margin-top:14px}.said{color:var(--ink)!important}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>mindjax · results</title>'
        f"<style>{CSS}{extra}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _table(head: tuple[str, list[str]], rows: Sequence[tuple[str, list[str]]], *, raw: bool = False) -> str:
    """An HTML table; cells are escaped unless they are `raw` markup."""
    top = "".join(f"<th>{escape(text).replace(', ', '<br>')}</th>" for text in (head[0], *head[1]))
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell if raw else escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


# As a picture


def _picture(files: Files, section: Section) -> Path:
    """Small multiples: curves over the steps, mean of the seeds and each seed; then differences with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = list(section.arms)[1:]
    colours = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(section.arms)}
    # What happens in training is seen in the curves.
    bars = [c for c in section.columns if c.on != "training" and section.cells[compared[0]][section.columns.index(c)]]
    panels, wide = len(section.curves) + len(bars), 4
    tall = -(-panels // wide)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(tall, wide, figsize=(14, 2.4 * tall + 0.5), layout="constrained", squeeze=False)
        places = iter(axes.flat)
        for name in section.curves:
            axis = next(places)
            for arm in section.arms:
                _curve(axis, [read_metrics(files.run(arm, seed)) for seed in section.seeds], name, colours[arm])
            axis.set_title(TRAINING[name].label if name in TRAINING else name, loc="left")
            axis.set_xlabel("step", loc="right")
            axis.grid(axis="y", alpha=0.25)
        for column in bars:
            axis, index = next(places), section.columns.index(column)
            for place, arm in enumerate(compared):
                cell = section.cells[arm][index]
                if cell is None or cell.difference is None:
                    continue
                d, scale = cell.difference, column.kind.scale
                axis.plot([scale * d.low, scale * d.high], [place, place], color=colours[arm], lw=2.5)
                axis.plot(scale * d.mean, place, "o", color=colours[arm], ms=6)
            axis.axvline(0, color="#6b7385", lw=1)
            axis.set_yticks([])
            axis.set_ylim(len(compared) - 0.4, -0.6)
            axis.set_title(f"{_label(section, column)}:\nless {section.arms[next(iter(section.arms))]}", loc="left")
            axis.grid(axis="x", alpha=0.25)
        for axis in places:
            axis.set_axis_off()
        handles = [pyplot.Line2D([], [], color=colours[arm], lw=3, label=title) for arm, title in section.arms.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), frameon=False)
        path = files.folder / "images" / f"results_{section.name}.png"
        # Without the date of the library's version, the same numbers make the same file.
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return path


def _curve(axis: Any, runs: Sequence[Sequence[Mapping[str, float]]], name: str, colour: str) -> None:
    scale = TRAINING[name].scale if name in TRAINING else 1.0
    first = 1 if name.endswith("_seconds") else 0  # which compiles
    lines = [[scale * record[name] for record in records[first:] if name in record] for records in runs]
    lines = [running_mean(line, max(1, len(line) // 12)) for line in lines if line]
    if not lines:
        return
    for line in lines:
        axis.plot(range(1, len(line) + 1), line, color=colour, lw=0.6, alpha=0.4)
    length = min(map(len, lines))
    axis.plot(range(1, length + 1), np.mean([line[:length] for line in lines], axis=0), color=colour, lw=1.8)


def _put(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
