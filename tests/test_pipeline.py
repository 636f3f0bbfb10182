"""The whole job at its debug size, once killed on the way and once not, and with a mixture of experts."""

import json
import shutil
from collections import Counter

import jax
import numpy as np
import pytest

from mindjax import pipeline
from mindjax.data.processor import Processor
from mindjax.evaluation import report
from mindjax.evaluation.run import read_replies
from mindjax.experiment import load_experiment, to_dataclass
from mindjax.models import catalog
from mindjax.train.loop import TrainResult
from mindjax.train.metrics import read_metrics


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs from one first stage: one that died in its second stage and was started again, one that did not."""
    interrupted, whole = tmp_path_factory.mktemp("interrupted"), tmp_path_factory.mktemp("whole") / "run"
    config = load_experiment("experiments/quickstart.py:debug")
    original = pipeline.Pipeline._ability

    def die(self, params, folder):
        shutil.copytree(interrupted, whole)
        original(self, params, folder)  # trained, with its checkpoint, but never evaluated
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.Pipeline, "_ability", die)
        with pytest.raises(Killed):
            pipeline.run(config, interrupted)
    before = (interrupted / "stages/knowledge/result.json").stat().st_mtime_ns
    pipeline.run(config, interrupted)
    assert (interrupted / "stages/knowledge/result.json").stat().st_mtime_ns == before, "a finished stage ran again"
    pipeline.run(config, whole)
    return interrupted, whole


@pytest.fixture(scope="module", params=["dense", "moe"])
def finished(request, tmp_path_factory):
    if request.param == "dense":
        return request.getfixturevalue("runs")[0]
    folder = tmp_path_factory.mktemp("moe")
    pipeline.run(load_experiment("experiments/quickstart.py:moe-debug"), folder)
    return folder


def test_every_stage_leaves_its_result_replies_and_model(finished):
    for stage in pipeline.STAGES:
        result = json.loads((finished / "stages" / stage / "result.json").read_text())
        assert result["steps"] > 0 and result["peak_memory"] > 0
        for name, by_family in result["accuracy"].items():
            replies = read_replies(finished / "replies" / stage / f"{name}.jsonl")
            assert {reply.task for reply in replies} == by_family.keys()
            for family, value in by_family.items():
                right = [reply.right for reply in replies if reply.task == family]
                assert value["mean"] == pytest.approx(np.mean(right))
        assert (finished / "stages" / stage / "model" / "model.safetensors").exists()


def test_the_arms_start_from_the_same_model_with_at_least_equal_compute_for_imitation(finished):
    assert pipeline.PARENTS["gspo"] == pipeline.PARENTS["continued"] == "preference"
    gspo, continued = (json.loads((finished / "stages" / s / "result.json").read_text()) for s in ("gspo", "continued"))
    assert gspo["flops"] > 0 and continued["flops"] > 0


def test_the_exported_folder_is_the_last_stage_and_opens(finished):
    config, params = catalog.load(finished / "model", dtype="float32")
    assert ("moe" in params["text"]["layers"]) == (config.text.num_experts > 0) == finished.name.startswith("moe")
    _, last = catalog.load(finished / "stages" / "dpo" / "model", dtype="float32")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, last)))
    _, first = catalog.load(finished / "stages" / "knowledge" / "model", dtype="float32")
    layers, before = (p["text"]["layers"] for p in (params, first))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), layers, before))), (
        "a part is not trained"
    )
    processor = Processor.from_pretrained(finished / "model")
    assert processor.image_token_id == config.image_token_id
    assert (
        json.loads((finished / "model" / "generation_config.json").read_text())["eos_token_id"]
        == processor.im_end_token_id
    )


def test_an_interrupted_run_gives_the_same_as_an_uninterrupted_one(runs):
    interrupted, whole = runs
    for stage in pipeline.STAGES:
        for path in sorted((whole / "replies" / stage).glob("*.jsonl")):
            assert path.read_text() == (interrupted / "replies" / stage / path.name).read_text()
        losses = [[record["loss"] for record in read_metrics(run / "stages" / stage)] for run in runs]
        assert losses[0] == losses[1] and losses[0]
    blend = json.loads((interrupted / "stages/ability/result.json").read_text())["blend"]
    assert sum(blend.values()) == pytest.approx(1.0)


def test_the_report_is_one_offline_file_with_every_part(finished):
    page = report.write(finished).read_text()
    for title in ("Held-out accuracy", "Two arms", "Curves", "gained and forgot", "Other forms", "What the models say",
                  "Time and memory", "To do it again"):  # fmt: skip
        assert title in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert page.count("data:image/png;base64,") == report.EXAMPLES_PER_FAMILY * (len(report.DESCRIPTIONS) - 1)
    assert "nan" not in page


def test_an_sft_stage_begins_easy_and_goes_on_mixed(tmp_path, monkeypatch):
    """The first epoch rises in difficulty with every family in each part of it; the control arm has no such order."""
    sizes = {"data.knowledge": 60, "sft_knowledge.steps": 24, "sft_continued.steps": 24, "levels": 3}
    config = load_experiment("experiments/quickstart.py:debug", [f"{key}={value}" for key, value in sizes.items()])
    job = pipeline.Pipeline(
        to_dataclass(pipeline.PipelineConfig, {k: v for k, v in config.items() if k != "kind"}), tmp_path
    )
    seen = {}

    def capture(step, state, loader, *, name, identity, **options):
        seen[name] = [loader.indices(i) for i in range(len(loader))], identity["data"]["difficulty"]
        return TrainResult({}, 1, 0.0, 0, {})

    monkeypatch.setattr("mindjax.sft.train.fit", capture)
    job._knowledge(job._initial(), tmp_path)
    job._continued(job._initial(), tmp_path)
    assert seen["continued"][1] is None
    steps = seen["knowledge"][0]
    samples = [sample for family in job.config.knowledge for sample in job._draw(family, 1, 60)]
    # The place of a sample among those of its family, from 0, the easiest, to 1.
    place = np.array([np.mean([o.difficulty < s.difficulty for o in samples if o.task == s.task]) for s in samples])
    epoch = next(i for i in range(len(steps)) if len({j for step in steps[: i + 1] for j in step}) == len(samples))
    thirds = np.array_split(np.concatenate(steps[: epoch + 1]), 3)
    assert np.mean(place[thirds[0]]) < 0.3 < np.mean(place[thirds[1]]) < 0.7 < np.mean(place[thirds[2]])
    for part in thirds:
        counts = Counter(samples[i].task for i in part)
        assert len(counts) == 4 and max(counts.values()) < 1.5 * min(counts.values())
    later = [np.mean(place[step]) for step in steps[epoch + 1 :]]
    assert len(later) > 5 and np.ptp(later) < 0.5


def test_every_family_is_described():
    config = load_experiment("experiments/quickstart.py")
    assert {*config.knowledge, *config.ability, "text_only"} <= report.DESCRIPTIONS.keys()
    assert set(config.explore) <= {*config.knowledge, *config.ability}
