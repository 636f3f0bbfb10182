"""The page of a run with its browser of rollouts."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mindjax.evaluation import rollouts

HOSTILE = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u2028\x00\x1b[31m\ud800"


class Page(HTMLParser):
    """What a browser would build: elements with attributes, and the text of each group."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.groups: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)
        if tag == "article":
            self.groups.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.groups and "article" in self.open:
            self.groups[-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def sample(text="red", total=1.0, advantage=0.5, flags=(), **parts):
    return {
        "text": text, "parts": {"correct": total} | parts, "total": total, "advantage": advantage,
        "flags": list(flags), "tokens": 3,
    }  # fmt: skip


def group(step=1, sample_id="a", task="colour", samples=(), images=(), prompt="What colour?", answer=None):
    return {
        "step": step, "prompt": prompt, "sample_id": sample_id, "task": task, "images": list(images),
        "answer": answer or {"kind": "exact", "value": "red"}, "samples": list(samples) or [sample()],
    }  # fmt: skip


def put(folder, groups, metrics=()):
    folder.mkdir(exist_ok=True)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return folder


def page_of(folder):
    path = rollouts.write(folder)
    assert path == folder / "report.html"
    return Page(path.read_text("utf-8"))


def test_groups_come_by_variance_with_replies_rewards_flags_and_pictures(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "one.png")
    calm = group(1, "calm", samples=[sample(), sample()])
    mixed = group(2, "mixed", samples=[sample("wrong one", 0.0, -0.75, ["redundant"], length=-0.25), sample()],
                  images=["one.png"], task="locate")  # fmt: skip
    page = page_of(put(tmp_path, [calm, mixed]))
    first, second = page.groups
    assert "mixed" in first and "calm" in second
    for shown in ("wrong one", "redundant", "-0.75", "+0.50", "-0.25", "correct", "length", "right: red"):
        assert shown in first
    assert first.index("+0.50") < first.index("-0.75"), "the best reply of a group stands first"
    assert "no picture" in second
    assert [a["data-step"] for a in page.all("article")] == ["2", "1"]
    assert [a["data-task"] for a in page.all("article")] == ["locate", "colour"]
    (picture,) = page.all("img")
    assert picture["src"].startswith("data:image/png;base64,")


def test_nothing_that_a_policy_writes_becomes_markup(tmp_path):
    hostile = group(1, HOSTILE, HOSTILE, [sample(HOSTILE, flags=[HOSTILE]) | {"parts": {HOSTILE: 1.0}}],
                    images=[HOSTILE, "../../etc/passwd", "<b>.png"], prompt=HOSTILE,
                    answer={"kind": "exact", "value": HOSTILE, "tolerance": HOSTILE})  # fmt: skip
    page = page_of(put(tmp_path / "x", [hostile], [{"step": 1, "reward": 0.5}]))
    assert len(page.all("script")) == 1 and not page.all("img")
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert page.groups[0].count("<script>alert(1)</script>") >= 5
    assert "\x00" not in page.groups[0] and "\u2400" in page.groups[0]
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert "unsafe-inline'; script" not in policy and "script-src 'sha256-" in policy


def test_the_only_script_is_the_one_that_the_policy_names(tmp_path):
    import base64
    import hashlib

    text = rollouts.write(put(tmp_path, [group()])).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in text


def test_long_replies_and_many_groups_are_bounded(tmp_path):
    many = [group(1, f"g{i}", samples=[sample("x" * 10_000_000 if i == 0 else "y", float(i % 2)), sample("z", 0.0)])
            for i in range(rollouts.MAX_GROUPS + 20)]  # fmt: skip
    path = rollouts.write(put(tmp_path, many))
    assert path.stat().st_size < 1_500_000
    page = Page(path.read_text())
    assert len(page.groups) == rollouts.MAX_GROUPS
    assert f"The {rollouts.MAX_GROUPS} of {len(many)}" in path.read_text()
    assert all("variance 0.25" in g for g in page.groups[: (rollouts.MAX_GROUPS + 20) // 2])


def test_a_repeated_step_counts_once_and_half_a_line_is_passed_over(tmp_path):
    put(tmp_path, [group(1, "a", samples=[sample("before")]), group(1, "a", samples=[sample("after")])])
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 2, "prom')
    (found,) = rollouts.read(tmp_path)
    assert found.samples[0]["text"] == "after"
    (tmp_path / "rollouts.jsonl").write_text('{"step": 2}\n' + json.dumps(group()) + "\n")
    with pytest.raises(ValueError, match="line 1, is no group"):
        rollouts.read(tmp_path)


def test_line_separators_inside_a_reply_do_not_end_its_line(tmp_path):
    line = json.dumps(group(samples=[sample("a\u2028b\x85c")]), ensure_ascii=False)
    (tmp_path / "rollouts.jsonl").write_text(line + "\n", "utf-8")
    assert rollouts.read(tmp_path)[0].samples[0]["text"] == "a\u2028b\x85c"


def test_curves_are_drawn_for_what_was_recorded(tmp_path):
    metrics = [{"step": i + 1, "reward": 0.1 * i, "pass@1": 0.1 * i, "pass@n": 0.5, "entropy": float("nan"),
                "redundant": 0.0, "rollout_kl": 1e-6 * i} for i in range(5)]  # fmt: skip
    text = rollouts.write(put(tmp_path, [], metrics)).read_text()
    assert "Right replies" in text and "Divergence of rollout" in text
    assert "Entropy" not in text and "Ratio" not in text, "not recorded as a number"
    assert "Replies cut" not in text, "never left 0"
    assert "<article" not in text
    with pytest.raises(ValueError, match="neither"):
        rollouts.write(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ({"kind": "one_of", "value": ["1", "2"]}, "1 or 2"),
        ({"kind": "within", "value": 40, "tolerance": 5}, "40 ± 5"),
        ("red", "red"),
        (None, "None"),
    ],
)
def test_the_truth_is_told_for_every_kind_of_answer(answer, shown):
    assert rollouts._truth(answer) == shown


def test_rewards_that_are_no_numbers_do_not_break_the_page(tmp_path):
    broken = group(samples=[sample() | {"total": None, "advantage": float("nan"), "parts": None}, sample()])
    (shown,) = page_of(put(tmp_path, [broken])).groups
    assert "variance 0" in shown
