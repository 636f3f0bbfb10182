"""The page of a run: one offline HTML file, made from what the stages left on disk, at any time during the run."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mindjax.evaluation import charts
from mindjax.evaluation.run import Reply, read_replies
from mindjax.evaluation.statistics import Interval, paired_bootstrap
from mindjax.evaluation.style import CSS
from mindjax.train.metrics import read_metrics
from mindjax.types import Sample

TITLES = {
    "knowledge": "SFT-Knowledge",
    "ability": "SFT-Ability",
    "preference": "SFT-Preference",
    "continued": "continued SFT",
    "gspo": "GSPO",
    "dpo": "DPO",
}
COLOURS = {
    "knowledge": "var(--c1)", "ability": "var(--c2)", "preference": "var(--c3)",
    "continued": "var(--c5)", "gspo": "var(--c4)", "dpo": "var(--c6)",
}  # fmt: skip
DESCRIPTIONS = {
    "digit_read": "three handwritten digits, read in order",
    "letters_read": "three letters in an unseen font over an unseen photograph",
    "shape": "colour and kind of the one shape on a photograph",
    "quadrant": "the quarter of a photograph that holds a cross",
    "colour": "the colour of one of two shapes",
    "digit_largest": "the place of the largest of three digits",
    "digit_count": "how often a digit occurs among four",
    "digit_any": "any one of three two-digit numbers",
    "locate": "how far right a cross lies, in percent, within 5",
    "text_only": "the same kind of question about digits written as text",
}
FORMS = {
    "boxed": ("in \\boxed{}", "a right answer without the box counts as wrong"),
    "choice": ("by letter", "three offered answers, A to C"),
    "ablated": ("picture taken away", "right is to say that there is no image"),
}
EXAMPLES_PER_FAMILY = 2


def save_examples(folder: Path, samples: Sequence[Sample]) -> None:
    """Keeps the first samples of each family for the page: pictures as PNG files, `index.json` written last."""
    folder.mkdir(parents=True, exist_ok=True)
    index, seen = [], dict.fromkeys((sample.task for sample in samples), 0)
    for sample in samples:
        if seen[sample.task] == EXAMPLES_PER_FAMILY:
            continue
        seen[sample.task] += 1
        parts = sample.messages[0]["content"]
        entry: dict[str, Any] = {"id": sample.id, "task": sample.task, "answer": sample.answer}
        for part in parts:
            if part["type"] == "image":
                entry["image"] = f"{sample.task}-{seen[sample.task]}.png"
                Image.fromarray(np.asarray(part["image"])).save(folder / entry["image"])
            else:
                entry["question"] = part["text"]
        index.append(entry)
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


@dataclass(frozen=True)
class RunFiles:
    """A run directory, read.

    Attributes:
      folder: the run's.
    """

    folder: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """`result.json` of the finished stages, in order."""
        paths = {stage: self.folder / "stages" / stage / "result.json" for stage in self.summary["stages"]}
        return {stage: json.loads(path.read_text()) for stage, path in paths.items() if path.exists()}

    @cached_property
    def families(self) -> dict[str, str]:
        return self.summary["families"]

    def accuracy(self, stage: str, name: str, family: str) -> Interval | None:
        value = self.results[stage]["accuracy"].get(name, {}).get(family)
        return Interval(**value) if value else None

    def mean(self, stage: str, name: str) -> float:
        """Over families, each counting the same."""
        return float(np.mean([value["mean"] for value in self.results[stage]["accuracy"][name].values()]))

    def replies(self, stage: str, name: str) -> list[Reply]:
        return read_replies(self.folder / "replies" / stage / f"{name}.jsonl")

    def metrics(self, stage: str) -> list[dict[str, float]]:
        return read_metrics(self.folder / "stages" / stage)

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text().strip() if path.exists() else ""

    def difference(self, first: str, second: str, name: str, families: Sequence[str]) -> Interval:
        """Accuracy of one stage less another's on the same held-out items, with a paired interval."""
        a = [float(r.right) for r in self.replies(first, name) if r.task in families]
        b = [float(r.right) for r in self.replies(second, name) if r.task in families]
        return paired_bootstrap([a], [b])


def text_table(folder: Path) -> str:
    """Greedy held-out accuracies so far, for a terminal."""
    run = RunFiles(folder)
    stages = list(run.results)
    width = max(map(len, run.families))
    lines = [f"{'':{width}}  {'blind':>6}" + "".join(f"  {TITLES[stage].replace('SFT-', ''):>13}" for stage in stages)]
    for family in run.families:
        cells = [f"{family:{width}}  {run.summary['baselines'][family]:6.0%}"]
        for stage in stages:
            value = run.accuracy(stage, "cloze", family)
            cells.append(f"{value.mean:.0%} ±{(value.high - value.low) / 2:.0%}".rjust(13) if value else " " * 13)
        lines.append("  ".join(cells))
    return "\n".join(lines)


def write(folder: Path) -> Path:
    """Writes `report.html` of a run directory and returns its path."""
    run = RunFiles(folder)
    sections = [
        _header(run), _accuracies(run), _arms(run), _curves(run), _forgetting(run), _forms(run), _examples(run),
        _costs(run), _reproduce(run),
    ]  # fmt: skip
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>mindjax · {escape(folder.name)}</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )
    path, draft = folder / "report.html", folder / "report.html.draft"
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, path)
    return path


def _header(run: RunFiles) -> str:
    results, summary = run.results, run.summary
    seconds = sum(r["train_seconds"] + r["evaluation_seconds"] for r in results.values())
    memory = max((r["peak_memory"] for r in results.values()), default=0)
    baseline = float(np.mean(list(summary["baselines"].values())))
    cards = []
    if results:
        # The last stage on the line that leads to the exported model.
        final = next(stage for stage in ("dpo", "gspo", "preference", "ability", "knowledge") if stage in results)
        cards.append(
            (f"{run.mean(final, 'cloze'):.0%}", f"mean held-out accuracy after {TITLES[final]}; blind {baseline:.0%}")
        )
    if {"gspo", "continued"} <= results.keys():
        gain = run.difference("gspo", "continued", "cloze", summary["explore"])
        cards.append((f"{100 * gain.mean:+.1f}", "points: GSPO over continued SFT of equal compute, where it explores "
                      f"({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"))  # fmt: skip
    cards.append((_clock(seconds), f"for {len(results)} of {len(summary['stages'])} stages with their evaluations"))
    cards.append((f"{memory / 2**30:.1f} GiB", "peak memory of the whole process"))
    model = summary["model"]
    experts = model["text"]["num_experts"]
    kind = f"mixture of {experts} experts, {model['text']['num_experts_per_tok']} a token" if experts else "dense"
    shown = "".join(f'<div class="card"><b>{value}</b><span>{escape(label)}</span></div>' for value, label in cards)
    return (
        "<header><h1>From random weights to a model that reads pictures</h1>"
        f"<p class=lead>A {summary['parameters'] / 1e6:.2f} M parameter Qwen3-VL ({kind}), a vocabulary of "
        f"{summary['vocabulary']} tokens trained on the spot, {len(run.families)} families of verifiable questions on "
        "handwritten digits, photographs, scans and set type. Every number below is measured on items whose glyphs, "
        f"photographs and fonts no training item shows. Seed {summary['seed']}.</p>"
        f'<div class="cards">{shown}</div></header>'
    )


def _accuracies(run: RunFiles) -> str:
    if not run.results:
        return ""
    items = sum(1 for _ in run.replies(next(iter(run.results)), "cloze")) // max(1, len(run.families))
    greedy, sampled = _table(run, "cloze"), _table(run, "cloze_sampled")
    return _section(
        "Held-out accuracy after every stage",
        f"{items} items a family, 95 % Wilson intervals. <b>Blind</b> is the best constant reply to each question, "
        "chosen on training items. A dot marks what a stage trains above all; GSPO and continued SFT are two arms that "
        "start from the same model.",
        '<div class="tabs"><input type="radio" name="t" id="t1" checked><label for="t1">greedy</label>'
        '<input type="radio" name="t" id="t2"><label for="t2">sampled at temperature 1</label>'
        f"<div class=tab>{greedy}</div><div class=tab>{sampled}</div></div>",
    )


def _trained(run: RunFiles, stage: str) -> set[str]:
    summary = run.summary
    knowledge, ability, explore = set(summary["knowledge"]), set(summary["ability"]), set(summary["explore"])
    return {"knowledge": knowledge, "ability": knowledge | ability, "gspo": explore, "continued": explore}.get(
        stage, set(run.families)
    )


def _table(run: RunFiles, name: str) -> str:
    stages = list(run.results)
    head = "".join(f"<th>{escape(TITLES[stage])}</th>" for stage in stages)
    rows = []
    for family, description in run.families.items():
        cells = [f"<th>{escape(family)}<small>{escape(description)}</small></th>"]
        cells.append(f"<td class=blind>{run.summary['baselines'][family]:.0%}</td>")
        for stage in stages:
            value = run.accuracy(stage, name, family)
            dot = "<i class=dot></i>" if family in _trained(run, stage) else ""
            cells.append(
                f'<td style="--heat:{value.mean:.3f}"><b>{value.mean:.0%}</b>{dot}'
                f"<small>{value.low:.0%} to {value.high:.0%}</small></td>"
                if value
                else "<td></td>"
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    baseline = float(np.mean(list(run.summary["baselines"].values())))
    means = "".join(f'<td style="--heat:{run.mean(s, name):.3f}"><b>{run.mean(s, name):.0%}</b></td>' for s in stages)
    rows.append(f"<tr class=mean><th>mean</th><td class=blind>{baseline:.0%}</td>{means}</tr>")
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th>family</th><th>blind</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _arms(run: RunFiles) -> str:
    if not {"gspo", "continued"} <= run.results.keys():
        return ""
    gspo, continued, explore = run.results["gspo"], run.results["continued"], run.summary["explore"]
    rows = []
    for label, families in [*((family, [family]) for family in explore), ("all of these", explore)]:
        for name, how in (("cloze", "greedy"), ("cloze_sampled", "sampled")):
            gain = run.difference("gspo", "continued", name, families)
            colour = "var(--good)" if gain.low > 0 else "var(--bad)" if gain.high < 0 else "var(--muted)"
            means = [
                np.mean([r.right for r in run.replies(stage, name) if r.task in families])
                for stage in ("preference", "continued", "gspo")
            ]
            rows.append(
                f"<tr><th>{escape(label)}<small>{how}</small></th>"
                + "".join(f"<td>{value:.1%}</td>" for value in means)
                + f"<td><b>{100 * gain.mean:+.1f}</b>"
                f"<small>{100 * gain.low:+.1f} to {100 * gain.high:+.1f}</small></td>"
                f"<td>{charts.interval(gain.mean, gain.low, gain.high, span=0.4, colour=colour)}</td></tr>"
            )
    ratio = continued["flops"] / gspo["flops"]
    return _section(
        "Does exploring help? Two arms from one checkpoint",
        f"Both arms start from SFT-Preference and see the same {gspo['prompts']:,} prompts, most of these two "
        "families, some of every other. Continued SFT imitates the "
        "reference replies and trains every parameter; GSPO sees verdicts on its own replies, its vision encoder is "
        f"frozen. Arithmetic: GSPO {gspo['flops'] / 1e12:.1f} TFLOP in {gspo['train_seconds']:.0f} s, continued SFT "
        f"{continued['flops'] / 1e12:.1f} TFLOP in {continued['train_seconds']:.0f} s ({ratio:.2f} times the "
        "arithmetic, counted on the shapes that are executed). Differences in points with paired 95 % bootstrap "
        "intervals over held-out items of this seed.",
        '<div class="scroll"><table><thead><tr><th>family</th><th>before</th><th>continued SFT</th><th>GSPO</th>'
        f"<th>gain</th><th>-40 · 0 · +40 points</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>",
    )


def _curves(run: RunFiles) -> str:
    shown, offset, losses = [], 0, []
    for stage in ("knowledge", "ability", "preference"):
        if stage in run.results:
            records = run.metrics(stage)
            steps = [offset + r["step"] for r in records]
            losses.append(charts.Series(TITLES[stage], steps, [r["nll"] for r in records], COLOURS[stage]))
            offset += len(records)
    shown.append(charts.lines("SFT: negative log-likelihood of a reply token", losses, zero=True, smooth=15))
    if "gspo" in run.results:
        records = run.metrics("gspo")
        steps = [r["step"] for r in records]

        def series(key: str, name: str, colour: str) -> charts.Series:
            return charts.Series(name, steps, [r[key] for r in records], colour)

        eps_low, eps_high = run.summary["eps"]
        shown += [
            charts.lines("GSPO: share of right answers", [series("pass@1", "of all samples", "var(--c4)"),
                         series("pass@n", "any of a group", "var(--c1)")], smooth=9, zero=True),
            charts.lines(f"GSPO: clipped responses (eps {eps_low:g} / {eps_high:g})", [
                         series("clip_low", "below", "var(--c5)"), series("clip_high", "above", "var(--c4)")],
                         smooth=9, zero=True),
            charts.lines("GSPO: groups with right and wrong answers", [series("informative", "", "var(--c3)")],
                         smooth=9, zero=True),
            charts.lines("GSPO: entropy of a sampled token", [series("entropy", "", "var(--c2)")], smooth=9, zero=True),
            charts.lines("GSPO: tokens in an answer", [series("length", "", "var(--c6)")], smooth=9, zero=True),
        ]  # fmt: skip
    if "continued" in run.results:
        records = run.metrics("continued")
        shown.append(charts.lines("continued SFT: negative log-likelihood", [
            charts.Series("", [r["step"] for r in records], [r["nll"] for r in records], COLOURS["continued"])],
            zero=True, smooth=15))  # fmt: skip
    if "dpo" in run.results:
        records = run.metrics("dpo")
        steps = [r["step"] for r in records]
        shown.append(charts.lines("DPO: loss", [charts.Series("", steps, [r["loss"] for r in records], COLOURS["dpo"])],
                                  zero=True, smooth=7))  # fmt: skip
        if "accuracy" in records[0]:
            shown.append(charts.lines("DPO: pairs in the right order", [charts.Series(
                "", steps, [r["accuracy"] for r in records], COLOURS["dpo"])], zero=True, smooth=7))  # fmt: skip
    return _section(
        "Curves", "Faint: every step. Strong: a running mean.", f'<div class="charts">{"".join(shown)}</div>'
    )


def _forgetting(run: RunFiles) -> str:
    stages = [stage for stage in run.results if run.summary["parents"][stage] in run.results]
    if not stages:
        return ""
    rows = []
    for family in run.families:
        cells = []
        for stage in stages:
            before = run.accuracy(run.summary["parents"][stage], "cloze", family)
            after = run.accuracy(stage, "cloze", family)
            change = after.mean - before.mean if before and after else 0.0
            # Paired: both models answered the same items.
            sure = run.difference(stage, run.summary["parents"][stage], "cloze", [family]).excludes_zero
            kind = ("gain" if change > 0 else "loss") if sure else "same"
            cells.append(f'<td class="{kind}" style="--heat:{min(1.0, abs(change) * 2):.3f}">{100 * change:+.0f}</td>')
        rows.append(f"<tr><th>{escape(family)}</th>{''.join(cells)}</tr>")
    head = "".join(
        f"<th>{escape(TITLES[stage])}<small>after {escape(TITLES[run.summary['parents'][stage]])}</small></th>"
        for stage in stages
    )
    return _section(
        "What each stage gained and forgot",
        "Change of greedy accuracy in points against the stage before. Coloured where the paired 95 % interval "
        "excludes zero, grey where it does not.",
        f'<div class="scroll"><table class="change"><thead><tr><th>family</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    )


def _forms(run: RunFiles) -> str:
    if not run.results:
        return ""
    stages, rows = list(run.results), []
    for name, (title, note) in FORMS.items():
        cells = "".join(
            f'<td style="--heat:{run.mean(stage, name):.3f}"><b>{run.mean(stage, name):.0%}</b></td>'
            for stage in stages
        )
        rows.append(f"<tr><th>{escape(title)}<small>{escape(note)}</small></th>{cells}</tr>")
    head = "".join(f"<th>{escape(TITLES[stage])}</th>" for stage in stages)
    return _section(
        "Other forms of the same questions",
        "Mean over families, greedy. SFT-Preference is the first stage that teaches these forms; GSPO and continued "
        "SFT rehearse the boxed form and see neither of the others, DPO has pairs of the first and the last.",
        f'<div class="scroll"><table class="heat"><thead><tr><th>form</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    )


def _examples(run: RunFiles) -> str:
    path = run.folder / "examples" / "index.json"
    if not path.exists() or not run.results:
        return ""
    replies = {stage: {r.id: r for r in run.replies(stage, "cloze")} for stage in run.results}
    cards = []
    for entry in json.loads(path.read_text()):
        picture = ""
        if "image" in entry:
            data = base64.b64encode((path.parent / entry["image"]).read_bytes()).decode()
            picture = f'<img alt="" src="data:image/png;base64,{data}">'
        said = "".join(
            f'<li class="{"right" if reply.right else "wrong"}"><span>{escape(TITLES[stage])}</span>'
            f"<code>{escape(reply.text.strip() or '(nothing)')}</code></li>"
            for stage in run.results
            if (reply := replies[stage].get(entry["id"]))
        )
        cards.append(
            f'<article><div class="picture">{picture or "<em>no picture</em>"}</div><p>{escape(entry["question"])}</p>'
            f"<p class=truth>right: <code>{escape(_truth(entry['answer']))}</code></p><ul>{said}</ul></article>"
        )
    return _section(
        "What the models say",
        f"The first {EXAMPLES_PER_FAMILY} held-out items of each family, not chosen; every stage's greedy reply.",
        f'<div class="examples">{"".join(cards)}</div>',
    )


def _truth(answer: Mapping[str, Any]) -> str:
    if answer["kind"] == "one_of":
        return " or ".join(answer["value"])
    if answer["kind"] == "within":
        return f"{answer['value']} ± {answer['tolerance']}"
    return str(answer["value"])


def _costs(run: RunFiles) -> str:
    if not run.results:
        return ""
    total = sum(r["train_seconds"] + r["evaluation_seconds"] for r in run.results.values())
    rows, parts = [], []
    for stage, result in run.results.items():
        parts.append(
            (result["train_seconds"], COLOURS[stage], f"{TITLES[stage]}: training {result['train_seconds']:.0f} s")
        )
        parts.append((result["evaluation_seconds"], "var(--line)", f"evaluation {result['evaluation_seconds']:.0f} s"))
        resumed = " (resumed: seconds since then)" if result["resumed"] else ""
        rows.append(
            f'<tr><th><i class=key style="background:{COLOURS[stage]}"></i>{escape(TITLES[stage])}{resumed}</th>'
            f"<td>{result['steps']:,}</td><td>{result['train_seconds']:.0f} s</td>"
            f"<td>{result['evaluation_seconds']:.0f} s</td><td>{result['peak_memory'] / 2**30:.2f} GiB</td></tr>"
        )
    return _section(
        "Time and memory",
        "Training with its compilation, data and checkpoints; evaluation (grey) with its compilation, and saving. "
        "Memory is the peak of the process up to the end of the stage.",
        charts.bar(parts, total)
        + '<div class="scroll"><table><thead><tr><th>stage</th><th>steps</th><th>training</th><th>evaluation</th>'
        f"<th>memory</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>",
    )


def _reproduce(run: RunFiles) -> str:
    commands = [line.split("  ", 1)[-1] for line in run.read("command.txt").splitlines()]
    versions = json.loads(run.read("versions.json") or "{}")
    text, vision = run.summary["model"]["text"], run.summary["model"]["vision"]
    blend = run.results.get("ability", {}).get("blend", {})
    facts = {
        "command": commands[-1] if commands else "",
        "started": f"{len(commands)} time{'s' * (len(commands) != 1)}",
        "seed": run.summary["seed"],
        "language model": f"{text['num_hidden_layers']} layers of {text['hidden_size']}, "
        f"{text['num_attention_heads']} heads of {text['head_dim']}, {text['num_key_value_heads']} for keys and values",
        "vision encoder": f"{vision['depth']} layers of {vision['hidden_size']}, patches of {vision['patch_size']}",
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "blend of SFT-Ability": ", ".join(f"{family} {share:.0%}" for family, share in blend.items()),
    }
    rows = "".join(
        f"<tr><th>{escape(k)}</th><td><code>{escape(str(v))}</code></td></tr>" for k, v in facts.items() if v
    )
    return _section(
        "To do it again",
        "The same command with the same seed gives the same numbers on the same machine.",
        f'<table class="facts"><tbody>{rows}</tbody></table>',
    )


def _section(title: str, note: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{note}</p>{body}</section>"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02} min"
