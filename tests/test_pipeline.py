"""The whole job at its debug size, killed once on the way."""

import json
import shutil

import jax
import numpy as np
import pytest

from mindjax import pipeline
from mindjax.data.processor import Processor
from mindjax.evaluation import report
from mindjax.evaluation.run import read_replies
from mindjax.experiment import load_experiment
from mindjax.models import catalog


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that died after its first stage, was copied, and was started again."""
    workdir = tmp_path_factory.mktemp("quickstart")
    config = load_experiment("experiments/quickstart.py:debug")
    original = pipeline.Pipeline._ability
    calls = []

    def die_once(self, params, folder):
        calls.append(folder)
        if len(calls) == 1:
            raise Killed
        return original(self, params, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.Pipeline, "_ability", die_once)
        with pytest.raises(Killed):
            pipeline.run(config, workdir)
        before = (workdir / "stages/knowledge/result.json").stat().st_mtime_ns
        shutil.copytree(workdir, tmp_path_factory.mktemp("copy") / "run")
        pipeline.run(config, workdir)
    assert (workdir / "stages/knowledge/result.json").stat().st_mtime_ns == before, "a finished stage ran again"
    return workdir


def test_every_stage_leaves_its_result_replies_and_model(finished):
    for stage in pipeline.STAGES:
        result = json.loads((finished / "stages" / stage / "result.json").read_text())
        assert result["steps"] > 0 and result["peak_memory"] < 6 * 2**30
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
    _, last = catalog.load(finished / "stages" / "dpo" / "model", dtype="float32")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, last)))
    processor = Processor.from_pretrained(finished / "model")
    assert processor.image_token_id == config.image_token_id
    assert (
        json.loads((finished / "model" / "generation_config.json").read_text())["eos_token_id"]
        == processor.im_end_token_id
    )


def test_a_resumed_run_equals_an_uninterrupted_one(finished):
    """Every number of a stage follows from the seed: the stage that died before its first step gives the same again."""
    blend = json.loads((finished / "stages/ability/result.json").read_text())["blend"]
    assert sum(blend.values()) == pytest.approx(1.0)
    records = [json.loads(line) for line in (finished / "stages/ability/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]


def test_the_report_is_one_offline_file_with_every_part(finished):
    page = report.write(finished).read_text()
    for title in ("Held-out accuracy", "Two arms", "Curves", "gained and forgot", "Other forms", "What the models say",
                  "Time and memory", "To do it again"):  # fmt: skip
        assert title in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert page.count("data:image/png;base64,") == report.EXAMPLES_PER_FAMILY * (len(report.DESCRIPTIONS) - 1)
    assert "nan" not in page


def test_every_family_is_described():
    config = load_experiment("experiments/quickstart.py")
    assert {*config.knowledge, *config.ability, "text_only"} <= report.DESCRIPTIONS.keys()
    assert set(config.explore) <= {*config.knowledge, *config.ability}
