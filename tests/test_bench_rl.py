"""`mindjax bench rl` at its tiny size, ours alone; the comparisons run by hand. What it counts is checked apart."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax import bench, bench_rl, bench_rl_sides
from mindjax.bench_rl_sides import RolloutCase, StepCase
from mindjax.models.qwen3_vl import abstract_params


def test_our_side_ends_in_seconds_and_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One process for what are three: pictures, and two updates with old log-probabilities of their own.
    monkeypatch.setattr(bench_rl, "ALONE", {})
    monkeypatch.setattr(bench_rl, "StepCase", partial(StepCase, pictures=True, updates=2))
    bench.main("rl --size tiny --sides mindjax --repetitions 2 --json".split())
    result = json.loads(capsys.readouterr().out)
    step, rollout = result["step"]["sides"], result["rollout"]["sides"]
    assert set(step) == {"mindjax"} and set(rollout) == {"mindjax", bench_rl.INT8}
    assert "int8" in rollout[bench_rl.INT8]["settings"] and "int8" not in rollout["mindjax"]["settings"]
    for side in (*step.values(), *rollout.values()):
        assert side["seconds"] > 0 and side["cpu_seconds"] > 0 and side["compiled"] == 0 and side["peak"] > 2**20
    shares = step["mindjax"]["shares"]
    assert set(shares) == set(bench_rl_sides.SHARES) and min(shares.values()) > 0
    assert sum(shares.values()) <= step["mindjax"]["seconds"]  # medians of two turns are means
    assert result["step"]["case"]["pictures"] and result["step"]["case"]["updates"] == 2
    case = result["rollout"]["case"]
    assert np.shape(case["lengths"]) == (2, 2) and rollout["mindjax"]["made"] == np.sum(case["lengths"])
    wanted = np.sum(case["lengths"]) / rollout["mindjax"]["seconds"]
    assert rollout["mindjax"]["tokens_per_second"] == pytest.approx(wanted)
    assert result["missed"] == [] and result["step"]["ratios"] == result["rollout"]["ratios"] == {}
    text = bench_rl.table(result)
    assert "RL step: 2 prompts x 2 samples, 24 + 8 tokens" in text and "floor:" in text and "transfer" in text


def test_answers_have_given_lengths_that_mix_the_prompts() -> None:
    lengths = RolloutCase().lengths
    assert lengths.shape == (4, 8) and (lengths.min(), lengths.max()) == (8, 64)
    assert (lengths == RolloutCase().lengths).all()  # the same on every side
    assert (np.diff(np.sort(lengths.reshape(-1))) <= 2).all() and len(set(lengths.mean(axis=1))) == 4
    assert (lengths.min(axis=1) < 36).all() and (lengths.max(axis=1) > 36).all()


@pytest.mark.parametrize("side", [0, 96])
def test_prompts_have_exactly_as_many_text_tokens(side: int) -> None:
    model, processor, samples = bench_rl_sides.conversations(bench_rl_sides.step_model("full"), 3, 64, side)
    rows = [bench_rl_sides.rendered(sample, processor) for sample in samples]
    assert [int((row.modality == 0).sum()) for row in rows] == [64] * 3
    assert [len(row.tokens) for row in rows] == [64 + (side > 0) * 36] * 3
    assert (rows[0].tokens == model.image_token_id).sum() == (side > 0) * 36
    assert any((rows[0].tokens != row.tokens).any() for row in rows[1:])
    with pytest.raises(ValueError, match="tokens around its text; ask for more"):
        bench_rl_sides.conversations(bench_rl_sides.step_model("full"), 1, 4, side)


def test_models_have_the_sizes_that_are_said() -> None:
    def count(tree: Any) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    model = bench_rl_sides.rollout_model("full")
    params = abstract_params(model, jnp.float32)
    assert 250e6 < count(params) < 270e6 and model.text.head_dim == 64
    step = bench_rl_sides.step_model("full").text
    assert (step.num_hidden_layers, step.hidden_size) == (4, 256)

    # Every weight of the language model is read once a step; the tied head is the embedding.
    case = RolloutCase(pictures=1, samples=1, shortest=2, longest=2)
    (_, prefill), (operations, size) = bench_rl.work(case)
    assert prefill == pytest.approx(4 * count(params["text"]), rel=1e-3)
    past = len(bench_rl_sides.prompts(case)[0].tokens) + 1
    kv = 4 * model.text.num_hidden_layers * 2 * model.text.num_key_value_heads * model.text.head_dim
    assert size - prefill == pytest.approx(past * kv)
    # A token more: two operations per weight, and its products with the keys and values before it.
    attention = 4 * past * model.text.num_hidden_layers * model.text.num_attention_heads * model.text.head_dim
    assert operations == pytest.approx(2 * count(params["text"]) + attention, rel=1e-3)


def test_finished_answers_are_no_work() -> None:
    short, full = bench_rl.work(RolloutCase(shortest=8)), bench_rl.work(RolloutCase(shortest=64))
    assert len(short) == len(full) == 64 and short[:8] == full[:8]
    assert 0.5 < sum(flops for flops, _ in short[1:]) / sum(flops for flops, _ in full[1:]) < 0.6  # 36 of 64 tokens


def test_bars_are_of_our_time_over_theirs() -> None:
    sides = {"mindjax": {"seconds": 1.0}, "tunix": {"seconds": 1.9}}
    ratios = bench_rl.ratios(sides)
    assert ratios == {"tunix": 1 / 1.9}
    rollout = {"mindjax": {"seconds": 1.0}, "transformers": {"seconds": 5.1}, "vllm": {"seconds": 0.8}}
    result = {"step": {"ratios": ratios}, "rollout": {"ratios": bench_rl.ratios(rollout)}}
    first, second = bench_rl.missed(result)
    assert "0.53 of tunix's time, more than 0.50" in first and "1.25 of vllm's time, more than 1.20" in second


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_rl.parse(["step", "--sides", "tunix"]).sides == ["tunix"]
    for wrong, message in (
        (["steps"], "unknown part steps; there are step, rollout"),
        (["--sides", "mindjax,vlm"], "unknown side vlm; there are mindjax, transformers, tunix, vllm"),
        (["--repetitions", "0"], "--repetitions must be at least 1, not 0"),
    ):
        with pytest.raises(SystemExit):
            bench_rl.parse(wrong)
        assert message in capsys.readouterr().err


def test_a_side_that_fails_says_why() -> None:
    worker = bench.Worker(["sh", "-c", "echo the reason >&2; exit 3"], {}, quiet=True)
    with pytest.raises(RuntimeError, match="status 3; the reason"):
        worker.read()


def test_tunix_is_given_the_same_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_rl, "tunix_python", lambda folder: tmp_path / "python")
    python, script, spec = bench_rl.tunix_step(StepCase(prompts=3, new_tokens=5))
    assert python == str(tmp_path / "python") and Path(script).is_file()
    given, ours = json.loads(spec), bench_rl_sides.step_model("full").text
    assert (given["prompts"], given["new_tokens"], given["warm_up"]) == (3, 5, bench_rl_sides.WARM_UP)
    assert given["model"]["embed_dim"] == ours.hidden_size and given["model"]["hidden_dim"] == ours.intermediate_size
    assert given["model"]["num_kv_heads"] == ours.num_key_value_heads and given["model"]["head_dim"] == ours.head_dim


def test_an_environment_of_another_version_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[list[str]] = []

    class Done:
        returncode, stderr = 0, ""

    def run(command: list[str], **_: Any) -> Done:
        ran.append(command)
        tmp_path.mkdir(exist_ok=True)
        return Done()

    monkeypatch.setattr(bench_rl.subprocess, "run", run)
    assert bench_rl.tunix_python(tmp_path) == tmp_path / "bin" / "python"
    assert ran[0][1:3] == ["-m", "venv"] and ran[1][-3:] == list(bench_rl.TUNIX)
    bench_rl.tunix_python(tmp_path)
    assert len(ran) == 2
    (tmp_path / "installed.json").write_text('["google-tunix==0.1.6"]')
    bench_rl.tunix_python(tmp_path)
    assert len(ran) == 4
