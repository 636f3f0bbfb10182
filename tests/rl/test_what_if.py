"""The figures of the RL notebook hold what the training functions return, and its sliders redraw them."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from mindjax.rl import what_if
from mindjax.rl.rewards import RewardConfig
from mindjax.types import Sample, Segment, Trajectory

matplotlib.use("agg")


def test_pass_at_k_shows_the_published_numbers() -> None:
    left, right = what_if.pass_at_k(k=4, answers=8).axes
    # (N, c, k) = (8, 2, 4); right answers from 1 on, wrong ones from 0 on.
    assert left.lines[0].get_ydata()[1] == pytest.approx(0.52223297)
    assert right.lines[0].get_ydata()[2] == pytest.approx(-0.17407766)
    assert [line.get_label() for line in left.lines] == ["k = 4", "k = 1", "k = 2", "k = 8"]


def test_the_clip_ends_the_gradient_on_both_sides_and_dual_clip_the_third() -> None:
    _, right = what_if.clip(eps_low=0.2, eps_high=0.28, dual_clip=3.0).axes
    good, dotted, bad = (line for line in right.lines if len(line.get_xdata()) > 2)
    ratio = np.asarray(good.get_xdata())
    assert (np.asarray(good.get_ydata())[ratio > 1.29] == 0).all() and (
        np.asarray(good.get_ydata())[ratio < 1.27] > 0
    ).all()
    for line, end in ((dotted, np.inf), (bad, 3.0)):
        slope = np.asarray(line.get_ydata())
        assert (slope[ratio < 0.79] == 0).all() and (slope[(ratio > 0.81) & (ratio < end - 0.02)] < 0).all()
        assert (slope[ratio > end + 0.02] == 0).all()


def test_weights_of_the_geometric_mean_stay_near_one() -> None:
    left, right = what_if.off_policy(noise=0.1, tokens=100, cap=1.5).axes
    assert max(left.lines[0].get_ydata()) == 1.5 and left.lines[1].get_ydata()[-1] == 0
    sequence, geometric = (np.array([bar.get_height() for bar in group]) for group in right.containers)
    assert sequence.sum() == geometric.sum() == 2000
    assert (geometric > 0).sum() < 5 < 20 < (sequence > 0).sum() and sequence[-2:].sum() > 200  # cut at the cap


def test_rewards_of_made_up_answers() -> None:
    sample = Sample(({"role": "user", "content": "2 + 2?"},), "0", "sum", {"kind": "int", "value": 4})
    config = RewardConfig(length=0.5, soft_length=8, format=0.2, gates=(("format", "correct"),))
    short, boxed, wrong, long = what_if.rewards(["4", r"\boxed{4}", r"\boxed{5}", "4" + " " * 40], sample, config)
    assert short["total"] == 1.0 and boxed["total"] == 1.2 and wrong["total"] == 0.0 and long["length"] == -1.0


def test_a_toy_reward_that_one_token_in_eight_earns() -> None:
    sample = Sample(({"role": "user", "content": "?"},), "0")
    tries = [Trajectory((Segment("policy", "", (token, 3)),), None, None) for token in range(16)]
    assert [what_if.multiple(one, sample)["correct"] for one in tries] == ([1.0] + [0.0] * 7) * 2


def test_sliders_redraw_and_say_what_is_refused() -> None:
    box = what_if.sliders(what_if.estimators, answers=(4, 16), k=(1, 8))
    answers, k, problem, picture = box.children
    assert (answers.value, k.value, problem.value) == (8, 4, "") and bytes(picture.value[:4]) == b"\x89PNG"
    before = picture.value
    answers.value = 5
    assert picture.value != before and problem.value == ""
    before, k.value = picture.value, 6
    assert "pass@6 needs 1 <= k <= 5" in problem.value and picture.value == before
    k.value = 2
    assert problem.value == "" and picture.value != before
    assert what_if.sliders(what_if.length, weight=(0.0, 1.0)).children[0].step == 0.1


def test_runs_are_drawn_with_their_first_phase(tmp_path: Path) -> None:
    for name, phases in (("plain", (1, 1, 1)), ("phased", (0, 0, 1))):
        rows = [{"step": step, "pass@1": step / 4, "phase": phase} for step, phase in enumerate(phases, 1)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = what_if.runs({name: tmp_path / name for name in ("plain", "phased")}, ("pass@1",), phase="phased")
    (axis,) = figure.axes
    assert [list(line.get_ydata()) for line in axis.lines] == [[0.25, 0.5, 0.75]] * 2
    (shade,) = axis.patches
    assert shade.get_x() == 0.5 and shade.get_x() + shade.get_width() == 2.5
