"""The page of a reinforcement-learning run: its curves, and a browser of what the policy said.

`write(workdir)` makes one offline HTML file from `<workdir>/metrics.jsonl` and `<workdir>/rollouts.jsonl`, at any time
during the run. What a policy writes is untrusted: all of it is shown as text, whatever it looks like.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mindjax.evaluation import charts
from mindjax.evaluation.style import CSS
from mindjax.train.metrics import read_metrics

# A page of some tens of megabytes opens slowly; of a longer run the groups with the largest variance are shown.
MAX_GROUPS = 300
MAX_CHARACTERS = 2000  # of one reply

# Title, the metrics drawn in it (name, label, colour), and whether its axis includes 0. What a run did not record is
# left out.
CURVES: tuple[tuple[str, tuple[tuple[str, str, str], ...], bool], ...] = (
    ("Reward of a reply", (("reward", "all", "var(--c1)"), ("reward_correct", "correctness", "var(--c4)"),
                           ("reward_length", "length", "var(--c5)")), False),
    ("Right replies", (("pass@1", "of all samples (pass@1)", "var(--c4)"),
                       ("pass@n", "any of a group (pass@n)", "var(--c1)")), True),
    ("Entropy of a sampled token, nats", (("entropy", "", "var(--c2)"),), True),
    ("Tokens in a reply", (("length", "", "var(--c6)"),), True),
    ("Replies cut", (("cut", "by their length", "var(--c6)"), ("redundant", "for going in circles", "var(--c5)")), True),
    ("Share that is clipped", (("clip_low", "below", "var(--c5)"), ("clip_high", "above", "var(--c4)")), True),
    ("Divergence of rollout and trainer (k3)", (("rollout_kl", "", "var(--c3)"),), True),
    ("Largest difference of a token's log-probability", (("rollout_max", "", "var(--c3)"),), True),
    ("Groups with right and wrong replies", (("informative", "", "var(--c3)"),), True),
    ("Prompts drawn for each that is kept", (("oversample", "", "var(--c5)"),), True),
    ("Phase: 0 Pass@k, 1 after it", (("phase", "", "var(--c1)"),), True),
    ("Seconds of a step", (("rollout_seconds", "rollout", "var(--c1)"), ("logprob_seconds", "log-probs", "var(--c2)"),
                           ("reward_seconds", "rewards", "var(--c5)"), ("update_seconds", "updates", "var(--c4)"),
                           ("transfer_seconds", "weights", "var(--c3)")), True),
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """One line of `rollouts.jsonl`.

    Attributes:
      step: after which it was written.
      prompt: what was asked.
      sample_id, task: of the sample.
      images: PNG files, relative ones to the run's folder.
      answer: what the verifier compared with.
      samples: each with "text", "parts" (rewards by name), "total", "advantage", "flags" and "tokens".
    """

    step: int
    prompt: str
    sample_id: str
    task: str
    images: tuple[str, ...]
    answer: Any
    samples: tuple[Mapping[str, Any], ...]

    @property
    def variance(self) -> float:
        """Of the rewards in the group; 0 where one is not a number."""
        totals = [_float(sample.get("total")) for sample in self.samples]
        return float(np.var(totals)) if totals and np.isfinite(totals).all() else 0.0


def read(workdir: str | Path) -> list[Group]:
    """The groups of `<workdir>/rollouts.jsonl`, that of a repeated (step, sample) the last one; [] without a file.

    Raises:
      ValueError: a line is no such group; half a line at the end, which a killed run leaves, is passed over.
    """
    path = Path(workdir) / "rollouts.jsonl"
    if not path.exists():
        return []
    groups: dict[tuple[int, str], Group] = {}
    # Not splitlines(): a reply may hold characters that Unicode calls line ends, and JSON does not escape.
    *whole, rest = path.read_text("utf-8", errors="replace").split("\n")
    for number, line in enumerate([*whole, rest], 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            group = Group(
                int(record["step"]), str(record["prompt"]), str(record["sample_id"]), str(record["task"]),
                tuple(record["images"]), record["answer"], tuple(record["samples"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            if number > len(whole):
                continue
            raise ValueError(f"{path}, line {number}, is no group of rollouts ({error!r}): {line[:80]!r}") from None
        groups[group.step, group.sample_id] = group
    return list(groups.values())


def write(workdir: str | Path) -> Path:
    """Writes `<workdir>/report.html` and returns its path.

    Raises:
      ValueError: there is no run in `workdir`, or a line of its files cannot be read.
    """
    folder = Path(workdir)
    records, groups = read_metrics(folder), read(folder)
    if not records and not groups:
        raise ValueError(f"{folder} holds neither metrics.jsonl nor rollouts.jsonl of a run")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing is loaded from anywhere, and no script but the one below runs, whatever a reply says.
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'
        f"<title>mindjax · {_plain(folder.name)}</title><style>{CSS}{STYLE}</style></head>"
        f"<body><main>{_header(folder, records, groups)}{_curves(records)}{_browser(folder, groups)}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
    path, draft = folder / "report.html", folder / "report.html.draft"
    draft.write_bytes(page.encode("utf-8", errors="replace"))  # a lone surrogate is a question mark
    os.replace(draft, path)
    return path


def _header(folder: Path, records: Sequence[Mapping[str, float]], groups: Sequence[Group]) -> str:
    cards = ""
    if records:
        last = records[max(0, len(records) - 10) :]
        for name, label, form in (
            ("reward", "reward", ".3f"), ("pass@1", "of the samples are right", ".0%"),
            ("pass@n", "of the groups hold a right one", ".0%"), ("entropy", "nats of entropy a token", ".3f"),
            ("length", "tokens a reply", ".1f"), ("rollout_kl", "divergence of rollout and trainer", ".1e"),
        ):  # fmt: skip
            values = [v for v in (_float(record.get(name)) for record in last) if math.isfinite(v)]
            if values:
                cards += f'<div class="card"><b>{np.mean(values):{form}}</b><span>{label}</span></div>'
    steps = f"{len(records)} steps" if records else "no step yet"
    return (
        f"<header><h1>{_plain(folder.name)}</h1><p class=lead>{steps}, {len(groups)} groups of rollouts kept. "
        f'Numbers: mean of the last {min(len(records), 10)} steps.</p><div class="cards">{cards}</div></header>'
    )


def _curves(records: Sequence[Mapping[str, float]]) -> str:
    pictures = []
    for title, shown, zero in CURVES:
        series = []
        for name, label, colour in shown:
            points = [(r["step"], _float(r[name])) for r in records if name in r]
            points = [(x, y) for x, y in points if math.isfinite(y)]
            if title == "Seconds of a step":
                points = points[1:]  # the first one compiles
            series.append(charts.Series(label, [x for x, _ in points], [y for _, y in points], colour))
        series = [s for s in series if len(s.x)]
        # One that repeats what its neighbour shows, or never leaves 0, says nothing.
        if title.startswith("Reward") and len(series) == 2 and list(series[0].y) == list(series[1].y):
            series = series[:1]
        if any(any(s.y) for s in series):
            pictures.append(charts.lines(title, series, zero=zero, smooth=9))
    if not pictures:
        return ""
    return (
        "<section><h2>Curves</h2><p>Faint: every step. Strong: a running mean.</p>"
        f'<div class="charts">{"".join(pictures)}</div></section>'
    )


def _browser(folder: Path, groups: Sequence[Group]) -> str:
    if not groups:
        return ""
    chosen = sorted(groups, key=lambda group: (-group.variance, -group.step, group.sample_id))[:MAX_GROUPS]
    steps, tasks = sorted({g.step for g in chosen}), sorted({g.task for g in chosen})
    note = f" The {MAX_GROUPS} of {len(groups)} with the largest variance." if len(groups) > MAX_GROUPS else ""
    step_options = "".join(f"<option>{step}</option>" for step in steps)
    task_options = "".join(f'<option value="{_plain(task)}">{_plain(task) or "(none)"}</option>' for task in tasks)
    return (
        "<section><h2>Rollouts</h2><p>A card is one prompt with all replies that were sampled to it. Groups in which "
        f"rewards differ most come first: from those the policy learns.{note}</p>"
        f'<form class="filter"><label>step <select id="step"><option value="*">all</option>{step_options}</select>'
        f'</label><label>task <select id="task"><option value="*">all</option>{task_options}</select></label>'
        f'<output id="shown">{len(chosen)} groups</output></form>'
        f'<div class="groups">{"".join(_card(folder, group) for group in chosen)}</div></section>'
    )


def _card(folder: Path, group: Group) -> str:
    names = list(dict.fromkeys(name for sample in group.samples for name in sample.get("parts") or {}))
    head = "".join(f"<th>{_plain(str(name))}</th>" for name in names)
    rows = []
    for sample in sorted(group.samples, key=lambda sample: -_finite(sample.get("advantage"))):
        parts = sample.get("parts") or {}
        advantage = _finite(sample.get("advantage"))
        kind = "gain" if advantage > 0 else "loss" if advantage < 0 else "same"
        flags = "".join(f"<em>{_plain(str(flag))}</em>" for flag in sample.get("flags") or ())
        cells = "".join(f"<td>{_number(parts.get(name))}</td>" for name in names)
        rows.append(
            f"<tr><td class=said><bdi>{_text(str(sample.get('text', '')))}</bdi>{flags}</td>{cells}"
            f"<td><b>{_number(sample.get('total'))}</b></td>"
            f'<td class="{kind}">{_number(sample.get("advantage"), sign=True)}</td>'
            f"<td>{_plain(str(sample.get('tokens', '')))}</td></tr>"
        )
    pictures = "".join(_picture(folder, image) for image in group.images) or "<em>no picture</em>"
    return (
        f'<article class="group" data-step="{group.step}" data-task="{_plain(group.task)}">'
        f'<div class="asked"><div class="picture">{pictures}</div><p><bdi>{_text(group.prompt)}</bdi></p>'
        f"<p class=truth>right: <code>{_plain(_truth(group.answer))}</code></p>"
        f"<p class=truth>{_plain(group.task)} · step {group.step} · variance {group.variance:.3g}</p>"
        f"<p class=truth><code>{_plain(group.sample_id)}</code></p></div>"
        f'<div class="replies"><table><thead><tr><th>reply</th>{head}<th>reward</th><th>advantage</th><th>tokens</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div></article>"
    )


def _picture(folder: Path, image: Any) -> str:
    path = folder / str(image)
    if path.suffix != ".png" or not path.is_file():
        return f"<em>no file {_plain(str(image))}</em>"
    return f'<img alt="" loading="lazy" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _plain(text: str) -> str:
    """Escaped; control characters, which a page may not hold, appear as the pictures that Unicode has of them."""
    return escape("".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in text))


def _text(text: str) -> str:
    """What somebody wrote, cut where it becomes too long to read."""
    more = f" <em>{len(text) - MAX_CHARACTERS:,} more characters</em>" if len(text) > MAX_CHARACTERS else ""
    return (_plain(text[:MAX_CHARACTERS]) or "<em>(nothing)</em>") + more


def _truth(answer: Any) -> str:
    if not isinstance(answer, Mapping):
        return str(answer)
    value = answer.get("value", answer.get("values", ""))
    text = " or ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{text} ± {answer['tolerance']}" if "tolerance" in answer else text


def _number(value: Any, *, sign: bool = False) -> str:
    number = _float(value)
    if not math.isfinite(number):
        return "" if value is None else _plain(str(value))
    number = round(number, 2) + 0.0  # no -0
    return f"{number:+.2f}" if sign else f"{number:.2f}".removesuffix(".00")


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _finite(value: Any) -> float:
    number = _float(value)
    return number if math.isfinite(number) else 0.0


def _policy() -> str:
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{script}'"


# ruff: noqa: E501
STYLE = """
.filter{display:flex;flex-wrap:wrap;gap:10px 18px;align-items:center;margin-bottom:14px;color:var(--muted);font-size:13px}
.filter select{font:inherit;color:var(--ink);background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:5px 8px;margin-left:4px}
.groups{display:grid;gap:14px}
.group{display:grid;grid-template-columns:minmax(170px,230px) 1fr;padding:0}
.group[hidden]{display:none}
.group p{overflow-wrap:anywhere;white-space:pre-wrap}
.asked{border-right:1px solid var(--line);padding-bottom:12px}
.group .picture{height:auto;min-height:64px;padding:10px}
.group .picture img{height:auto;min-height:64px;max-height:160px;max-width:100%}
.replies{overflow-x:auto}
.replies th:first-child{position:static}
.replies td.said{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;min-width:200px;font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:13px}
.said em{font:11px system-ui,sans-serif;border:1px solid var(--bad);color:var(--bad);border-radius:6px;padding:0 5px;margin-left:6px}
.replies .gain{color:var(--good);font-weight:600}.replies .loss{color:var(--bad);font-weight:600}.replies .same{color:var(--muted)}
@media (max-width:640px){.group{grid-template-columns:1fr}.asked{border-right:0;border-bottom:1px solid var(--line)}}
"""
SCRIPT = """
const step=document.getElementById('step'),task=document.getElementById('task'),shown=document.getElementById('shown');
function filter(){let count=0;for(const group of document.querySelectorAll('.group')){
group.hidden=(step.value!=='*'&&group.dataset.step!==step.value)||(task.value!=='*'&&group.dataset.task!==task.value);
count+=!group.hidden}shown.textContent=count+(count===1?' group':' groups')}
if(step){step.addEventListener('change',filter);task.addEventListener('change',filter);filter()}
"""
