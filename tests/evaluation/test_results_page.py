"""Tables and pictures of a comparison job, from files with known numbers."""

import json

import numpy as np
import pytest

from mindjax.evaluation import draws, results_page
from mindjax.evaluation.results_page import Column
from mindjax.evaluation.statistics import paired_bootstrap

SEEDS = (0, 1, 2)


def item(task, right, set="plain", greedy=1):
    return {
        "set": set, "id": "x", "task": task, "greedy": greedy, "text": "red", "right": right,
        "texts": ["red"] * len(right), "tokens": [2] * len(right), "surprise": [0.5] * len(right),
        "finish": ["stop"] * len(right), "distinct": sum(right),
    }  # fmt: skip


def put_run(folder, items, metrics=(), middle=()):
    folder.mkdir(parents=True)
    draws.write(folder / "end.jsonl", items)
    if middle:
        draws.write(folder / "middle.jsonl", middle)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (folder / "result.json").write_text(
        json.dumps({"train_seconds": 7.0, "resumed": False, "steps": 3, "samples": 10, "parameters": 1_500_000})
    )


def right_of(arm, seed):
    """Replies to 12 items of each family: those of b are right more often, by another share in each seed."""
    rng = np.random.default_rng([seed, arm == "b"])
    return [(rng.random(8) < 0.4 + 0.4 * (arm == "b")).astype(int).tolist() for _ in range(12)]


@pytest.fixture
def job(tmp_path):
    columns = [{"measure": "pass@1"}, {"measure": "pass@1", "at": "middle"},
               {"measure": "distinct", "families": "many"}, {"measure": "invented", "on": "ablated"},
               {"measure": "rollout_seconds", "on": "training"},
               {"measure": "rollout_kl", "on": "training"}]  # fmt: skip
    comparison = {"title": "A | B", "question": "Does <b> help?", "arms": ["a", "b"], "columns": columns,
                  "curves": ["rollout_kl"]}  # fmt: skip
    summary = {
        "seeds": SEEDS, "samples": 8, "held_out": 12, "families": ["one"], "several": ["many"],
        "workers": 2, "cores": 2,
        "base": {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 8},
        "arms": {"a": {"title": "plain"}, "b": {"title": "<better>"}, "c": {"title": "not run"}},
        "comparisons": {"ab": comparison, "ac": {**comparison, "title": "A and C", "arms": ["a", "c"]}},
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for arm in "ab":
        for seed in SEEDS:
            replies = right_of(arm, seed)
            items = [item(task, r) for task in ("one", "many") for r in replies]
            items += [item(task, [0] * 8, "ablated", 0) for task in ("one", "many") for _ in replies]
            metrics = [
                {"step": i + 1, "rollout_seconds": 100.0 if i == 0 else 2.0, "rollout_kl": 1e-5} for i in range(5)
            ]
            middle = [item(task, [1] * 8) for task in ("one", "many") for _ in replies]
            put_run(tmp_path / "runs" / f"{arm}-{seed}", items, metrics, middle)
    put_run(tmp_path / "start", [item(task, [0] * 8, s) for task in ("one", "many") for s in ("plain", "ablated")])
    return tmp_path


def test_cells_are_means_with_paired_intervals_over_seeds_and_items(job):
    files = results_page.Files(job)
    cell = files.cell("b", "a", SEEDS, Column("pass@1"))
    means = [np.mean(right_of("b", seed)) for seed in SEEDS]
    assert cell.by_seed == pytest.approx(means)
    a, b = ([[np.mean(r) for r in right_of(arm, s) * 2] for s in SEEDS] for arm in "ab")
    assert cell.difference == paired_bootstrap(b, a) and cell.difference.excludes_zero
    assert files.cell("a", "a", SEEDS, Column("pass@1")).difference is None
    many = files.values("b", 0, Column("distinct", families="many"))
    assert many == [sum(r) for r in right_of("b", 0)]
    assert files.values("b", 1, Column("pass@1", at="middle")) == [1.0] * 24
    assert files.values("b", 1, Column("pass@1", families="single")) == [np.mean(r) for r in right_of("b", 1)]
    assert files.values("b", 0, Column("invented", on="ablated")) == [1.0] * 24


def test_seconds_leave_out_the_step_that_compiles_and_missing_metrics_an_empty_cell(job):
    files = results_page.Files(job)
    assert files.values("a", 0, Column("rollout_seconds", on="training")) == [2.0]
    assert files.values("a", 0, Column("redundant", on="training")) == []
    assert files.cell("a", "a", SEEDS, Column("redundant", on="training")) is None
    assert files.cell("start", "a", SEEDS, Column("rollout_kl", on="training")) is None


def test_the_start_is_compared_with_every_seed(job):
    cell = results_page.Files(job).cell("start", "a", SEEDS, Column("pass@1", families="one"))
    assert cell.by_seed == (0.0, 0.0, 0.0)
    assert cell.difference is None, "other items, so nothing is paired"


def test_text_and_page_say_the_same_and_publish_copies_the_text(job, tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text("Over all: fine.\n\n## ab\n\nIt <i>helps</i>.\n\nReally.\n\n## other\n\nNever shown.\n")
    docs = tmp_path / "docs"
    page = results_page.write(job, str(notes), str(docs)).read_text()
    text = (job / "results.md").read_text()
    assert text == (docs / "results.md").read_text()
    assert (docs / "images" / "results_ab.png").read_bytes() == (job / "images" / "results_ab.png").read_bytes()
    cell = results_page.Files(job).cell("b", "a", SEEDS, Column("pass@1"))
    d = cell.difference
    shown = f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})"
    assert f"{100 * cell.mean:.1f}<br>**{shown}**" in text and f"<b>{shown}</b>" in page
    assert "1.0e-05<br>" in text
    assert text.count("Not run yet") == page.count("Not run yet") == 1
    assert "Over all: fine." in text and "It <i>helps</i>.\n\nReally." in text and "Never shown" not in text
    assert "It &lt;i&gt;helps&lt;/i&gt;." in page and "Does &lt;b&gt; help?" in page and "&lt;better&gt;" in page


def test_the_same_numbers_make_the_same_files(job):
    results_page.write(job)
    first = {path.name: path.read_bytes() for path in [*job.glob("*.md"), *job.glob("*.html"), *job.glob("images/*")]}
    results_page.write(job)
    assert len(first) == 3 and all((job / name).read_bytes() == first[name] for name in ("results.md", "report.html"))


def test_means_are_by_family(job):
    found = results_page.means(job / "runs" / "b-0", "pass@1")
    assert found == pytest.approx({"one": np.mean(right_of("b", 0)), "many": np.mean(right_of("b", 0))})


def test_an_unknown_measure_is_refused():
    with pytest.raises(ValueError, match="no measure 'speed' on plain"):
        Column("speed")
    with pytest.raises(ValueError, match="no measure 'greedy' on training"):
        Column("greedy", on="training")


@pytest.mark.parametrize(
    ("measure", "value", "plain", "signed"),
    [("greedy", 0.7314, "73.1", "+73.1"), ("greedy", -0.0001, "0.0", "0.0"), ("distinct", -1.25, "-1.25", "-1.25")],
)
def test_numbers_are_written_with_their_unit(measure, value, plain, signed):
    kind = results_page.MEASURES[measure]
    assert (kind.text(value), kind.text(value, sign=True)) == (plain, signed)
