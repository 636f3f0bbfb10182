"""The comparison job at its debug size: once killed on the way and once not."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from mindjax import results
from mindjax.data import tasks
from mindjax.data.tasks.verify import is_right
from mindjax.evaluation import draws, results_page
from mindjax.evaluation.draws import Reply
from mindjax.experiment import load_experiment, to_dataclass

ARMS = ("base", "diverse", "dpo")


class Killed(Exception):
    pass


def load(name):
    loaded = load_experiment(name)
    return to_dataclass(results.ResultsConfig, {key: value for key, value in loaded.items() if key != "kind"})


@pytest.fixture(scope="module")
def config():
    return load("experiments/results.py:debug")


@pytest.fixture(scope="module")
def full():
    return load("experiments/results.py")


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """Two jobs of three arms: one that died in the second, trained but not judged, and went on; one that did not."""
    comparison = replace(config.comparisons[0], arms=("base", "diverse", "dpo", "start"))
    few = replace(config, arms=tuple(config.arm(name) for name in ARMS), comparisons=(comparison,))
    interrupted, whole = tmp_path_factory.mktemp("interrupted"), tmp_path_factory.mktemp("whole") / "job"
    examine = results.Results._examine

    def die(self, params, path, sets, tokens):
        if path.parent.name == "diverse-0":
            if path.name == "end.jsonl":
                raise Killed
            shutil.copytree(interrupted, whole)
            shutil.rmtree(whole / "runs" / "diverse-0")
        examine(self, params, path, sets, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results.Results, "_examine", die)
        with pytest.raises(Killed):
            results.Results(few, interrupted).run()
    first = (interrupted / "runs/base-0/result.json").stat().st_mtime_ns
    assert not (interrupted / "runs/diverse-0/result.json").exists()
    results.Results(few, interrupted).run()
    assert (interrupted / "runs/base-0/result.json").stat().st_mtime_ns == first, "a finished run ran again"
    results.Results(few, whole).run()
    return interrupted, whole


def test_every_run_leaves_its_result_its_replies_and_its_page(runs, config):
    for name in ARMS:
        folder = runs[0] / "runs" / f"{name}-0"
        result = json.loads((folder / "result.json").read_text())
        assert result["arm"] == name and result["seed"] == 0 and result["steps"] > 0
        items = draws.read(folder / "end.jsonl")
        count = len(config.all_families) * config.data.held_out
        assert [item["set"] for item in items] == ["plain"] * count + ["ablated"] * count
        assert all(len(item["texts"]) == len(item["right"]) == config.samples for item in items)
        if name != "dpo":
            assert (folder / "report.html").exists() and draws.read(folder / "middle.jsonl")
    assert json.loads((runs[0] / "runs/dpo-0/result.json").read_text())["pairs"] > 0


def test_a_job_that_was_killed_ends_as_one_that_was_not(runs):
    interrupted, whole = runs
    for run in ("diverse-0", "dpo-0"):
        for name in ("middle.jsonl", "end.jsonl"):
            if (interrupted / "runs" / run / name).exists():
                assert (interrupted / "runs" / run / name).read_text() == (whole / "runs" / run / name).read_text()
    assert json.loads((interrupted / "runs/diverse-0/result.json").read_text())["resumed"]
    assert not json.loads((whole / "runs/diverse-0/result.json").read_text())["resumed"]
    a, b = ((folder / "results.md").read_text().split("## Where")[1] for folder in runs)
    assert a == b


def test_the_page_has_every_comparison_with_its_picture(runs):
    text = (runs[0] / "results.md").read_text()
    assert "Pass@k, then diversity" in text and "| before |" in text
    (picture,) = (runs[0] / "images").glob("results_*.png")
    assert f"images/{picture.name}" in text
    assert "data:image/png;base64," in (runs[0] / "report.html").read_text()


def test_arms_differ_from_the_base_in_what_they_say_alone(config, full):
    base = config.recipe("base")
    assert base == config.base
    assert config.recipe("int8_sequence") == replace(
        base, rollout=replace(base.rollout, weights="int8"), off_policy=replace(base.off_policy, level="sequence")
    )
    token = full.recipe("int8_token")
    assert (token.level, token.off_policy.level, token.rollout.weights) == ("token", "token", "int8")
    assert replace(full.recipe("token"), rollout=token.rollout, off_policy=token.off_policy) == token
    diverse = config.recipe("diverse")
    assert diverse.advantage.estimator == "diversity" and diverse.advantage.distance.kind == "exact"
    assert replace(diverse, advantage=base.advantage) == base


def test_arms_of_a_comparison_have_the_same_steps_prompts_and_rollouts(config, full):
    """The one exception is what oversampling is about, and DPO, which comes on top."""
    for each in (config, full):
        for comparison in each.comparisons:
            specs = [each.arm(name) for name in comparison.arms if name != "start" and not each.arm(name).after]
            recipes = [each.recipe(spec.name) for spec in specs]
            assert len({(r.steps, r.prompts_per_step, r.samples_per_prompt, r.max_new_tokens) for r in recipes}) == 1
            assert len({r.optimizer for r in recipes}) == len({spec.prompts for spec in specs}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"arms": (*c.arms, replace(c.arms[0], changes={"stepz": 3}, name="x"))}, "'x'.*stepz"),
        (lambda c: {"arms": (*c.arms, replace(c.arms[0], changes={"off_policy": {"level": "token"}}, name="x"))},
         "'x'.*level='token'"),
        (lambda c: {"arms": (*c.arms, c.arms[0])}, "names of their own"),
        (lambda c: {"arms": (*c.arms, replace(c.arms[0], name="start"))}, "names of their own"),
        (lambda c: {"arms": (*c.arms, replace(c.arms[0], name="x", after="dpo"))}, "cannot come after 'dpo'"),
        (lambda c: {"comparisons": (replace(c.comparisons[0], arms=("base", "bass")),)}, "needs two arms.*bass"),
        (lambda c: {"seeds": ()}, "at least one seed"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_refused_and_says_where(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change(config))


def test_a_thought_adds_words_and_changes_nothing_else():
    rng = np.random.default_rng(0)
    samples = tasks.build("colour", "train", 200, 5)
    thought = [results.thoughtful(sample, rng) for sample in samples]
    counts = []
    for before, after in zip(samples, thought, strict=True):
        reply = after.messages[-1]["content"]
        counts.append(reply.count(results.THOUGHT))
        assert is_right(after.answer, reply) and after.answer == before.answer
        assert after.messages[0]["content"][0] is before.messages[0]["content"][0]
        assert after.messages[0]["content"][1]["text"].endswith(f"? {results.ASK_TO_THINK}")
        assert results.ASK_TO_THINK not in before.messages[0]["content"][1]["text"]
    assert set(counts) == {0, 1, 2, 3, 4, 12}


def test_without_its_picture_a_question_is_answered_by_saying_so():
    (sample,) = tasks.build("colour", "test", 1, 0)
    twin = results.without_picture(sample)
    assert [part["type"] for part in twin.messages[0]["content"]] == ["text"]
    assert is_right(twin.answer, "There is no image.") and not is_right(twin.answer, sample.messages[-1]["content"])


def test_half_of_the_demonstrations_without_a_picture_are_invented(config, tmp_path):
    samples = results.Results(config, tmp_path)._demonstrations()
    blind = [s for s in samples if all(part["type"] == "text" for part in s.messages[0]["content"])]
    said = [s.messages[-1]["content"] == tasks.NO_IMAGE for s in blind]
    assert len(blind) == config.data.ablated * len(config.all_families) and sum(said) == len(blind) / 2


def reply(text, right, tokens=2, surprise=0.5, finish="stop"):
    return Reply(text, right, tokens, surprise, finish)


def test_different_right_replies_are_counted_however_they_are_written():
    (sample,) = tasks.build("shape_any", "test", 1, 0)
    drawn = [reply("red circle", True), reply("\\boxed{Red  circle.}", True), reply("blue cross", True),
             reply("green cross", False), reply("green square", False, 9, 2.0, "length")]  # fmt: skip
    record = draws.record(sample, reply("red circle", True), drawn)
    assert record["distinct"] == 2 and record["right"] == [1, 1, 1, 0, 0] and record["greedy"] == 1
    per_item = {name: measure(record) for name, measure in results_page.PER_ITEM.items()}
    assert per_item == pytest.approx(
        {"greedy": 1, "pass@1": 0.6, "pass@n": 1, "distinct": 2, "entropy": 0.8, "length": 3.4, "not stopped": 0.2,
         "invented": 0, "invented, T = 1": 0.4}
    )  # fmt: skip
