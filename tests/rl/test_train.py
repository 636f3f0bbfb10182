"""The GSPO loop: what it packs, that it learns, that it resumes to the bit, that it compiles once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mindjax.data.packing import size_of
from mindjax.experiment import load_experiment
from mindjax.inference.generate import stop_token_ids
from mindjax.inference.sampler import SamplingConfig, prompt_shape
from mindjax.rl import train as rl_train
from mindjax.rl.config import RLConfig, RolloutConfig, frozen_vision
from mindjax.rl.engine import NativeEngine
from mindjax.rl.objective import GSPOLoss
from mindjax.rl.rewards import RewardConfig
from mindjax.rl.rollout import (
    Prompt,
    Response,
    Rollout,
    pack_responses,
    policy_shape,
    read_pictures,
    reply_text,
    roll_out,
    single_turn,
)  # fmt: skip
from mindjax.rl.train import main, train
from mindjax.train.loop import NotFiniteError
from mindjax.types import Completion
from tests.inference.compiled import compilations
from tests.rl import tiny

FAST = replace(frozen_vision(), learning_rate=3e-3)
SMALL = RLConfig(
    steps=4, prompts_per_step=4, samples_per_prompt=4, updates_per_rollout=2, eps_low=0.2, eps_high=0.2,
    max_new_tokens=3, optimizer=FAST,
)  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> tuple[Any, ...]:
    return tiny.policy()


def records(workdir: Path) -> list[dict[str, float]]:
    """What the steps report, without clocks."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


def test_prompts_hide_the_reference_reply(policy: tuple[Any, ...]) -> None:
    _, _, processor = policy
    sample = tiny.samples()[1]
    prompt = Prompt.of(0, sample, processor)
    assert len(prompt.images) == 1 and len(prompt.rendered.frames) == 1
    rendered = prompt.rendered
    text = processor.tokenizer.decode(rendered.tokens)
    assert text.endswith("<|im_start|>assistant\n") and sample.messages[-1]["content"] not in text
    with pytest.raises(ValueError, match="no message to answer"):
        Prompt.of(0, replace(sample, messages=sample.messages[-1:]), processor)


def test_rows_hold_what_was_sampled(policy: tuple[Any, ...]) -> None:
    """Token by token, even where the text would be tokenized otherwise, with its prompt, image and log-probs."""
    config, _, processor = policy
    prompts = [Prompt.of(0, sample, processor).rendered for sample in tiny.samples(3)]
    # One letter a token: tokenizing "colour" again would merge it.
    spelt = processor.tokenizer.convert_tokens_to_ids(list("colour"))
    assert len(processor.encode_text("colour")) < len(spelt)
    completions = [
        Completion(tuple(spelt[: 2 + i]), tuple(-0.1 * (i + 1) * np.arange(1, 3 + i)), "length") for i in range(4)
    ]
    responses = [
        Response(single_turn(prompts[i // 2 + 1], completions[i], processor), 0.5 * i - 1, counts=i != 3)
        for i in range(4)
    ]
    sizes = [size_of(prompt) for prompt in prompts]
    shape = policy_shape(sizes, config, responses=6, samples=2, per_row=2, max_new_tokens=6)
    policy_batch, _ = pack_responses(responses, shape, 2)
    assert policy_batch.advantages.tolist() == [-1.0, -0.5, 0.0, 0.0, 0.0, 0.0], "the last one does not count"
    for number, response in enumerate(responses[:3]):
        row, completion = number // 2, completions[number]
        mine = policy_batch.response_ids[row] == number + 1
        assert policy_batch.batch.tokens[row, mine].tolist() == list(completion.token_ids)
        np.testing.assert_allclose(policy_batch.logp_rollout[row, mine], completion.logprobs, rtol=1e-6)
        assert (policy_batch.batch.loss_mask[row, mine] == 1).all()
        segment = policy_batch.batch.segment_ids[row] == number % 2 + 1
        whole = response.trajectory.rendered
        np.testing.assert_array_equal(policy_batch.batch.tokens[row, segment], whole.tokens)
        np.testing.assert_array_equal(policy_batch.batch.positions[row, segment], whole.positions)
    assert policy_batch.batch.loss_mask.sum() == sum(len(c.token_ids) for c in completions[:3])
    assert (policy_batch.response_ids > 0).sum() == policy_batch.batch.loss_mask.sum()
    # The two answers to a picture share one copy of its patches.
    stored = (np.asarray(policy_batch.batch.vision.segment_ids) > 0).sum()
    assert stored == sum(len(patches) for prompt in prompts[1:3] for patches, _ in prompt.frames)


@pytest.fixture(scope="module")
def rolled(policy: tuple[Any, ...]) -> tuple[list[Prompt], NativeEngine, Rollout]:
    """(prompts, the engine, a rollout of the first four with their pictures)."""
    config, params, processor = policy
    prompts = [Prompt.of(i, sample, processor) for i, sample in enumerate(tiny.letters())]
    sizes = [size_of(prompt.rendered) for prompt in prompts]
    engine = NativeEngine(config, RolloutConfig(), {4: (prompt_shape(sizes, 3, config),)})
    engine.update(params, 0)
    rollout = roll_out(
        engine, processor, prompts[:4],
        sampling=SamplingConfig(max_new_tokens=3, num_samples=4, stop_token_ids=stop_token_ids(processor)),
        seed=0, step=0, rewarder=RewardConfig().build(3), keep_pictures=True,
    )  # fmt: skip
    return prompts, engine, rollout


def test_rollout_scores_what_the_texts_say(policy: tuple[Any, ...], rolled: tuple[Any, ...]) -> None:
    _, _, processor = policy
    for group in rolled[2].groups:
        for trajectory, score in zip(group.trajectories, group.scores, strict=True):
            (segment,) = trajectory.segments
            assert trajectory.text == processor.tokenizer.decode(segment.token_ids).removesuffix("<|im_end|>")
            assert score.total == float(trajectory.text.strip().rstrip(".").strip().lower() in set("abcdefghijklm"))


def test_control_tokens_in_a_reply_are_seen(policy: tuple[Any, ...]) -> None:
    _, _, processor = policy
    red = processor.encode_text("red")
    for end, text in [((), "red"), ((processor.im_end_token_id,), "red"),
                      ((processor.endoftext_token_id,), "red<|endoftext|>"),
                      ((processor.im_end_token_id,) * 2, "red<|im_end|>")]:  # fmt: skip
        assert reply_text(Completion((*red, *end), (), "stop"), processor) == text


def test_packing_does_not_change_the_gradient(policy: tuple[Any, ...], rolled: tuple[Any, ...]) -> None:
    """Rows of one answer, rows of four, and the sampler's log-probabilities as the trainer sees them."""
    config, params, _ = policy
    prompts, _, rollout = rolled
    rng = np.random.default_rng(0)
    responses = [
        Response(trajectory, float(rng.normal())) for group in rollout.groups for trajectory in group.trajectories
    ]
    sizes = [size_of(prompt.rendered) for prompt in prompts]
    gradients = []
    for per_row in (1, 4):
        shape = policy_shape(sizes, config, responses=16, samples=4, per_row=per_row, max_new_tokens=3)
        batch, _ = pack_responses(responses, shape, per_row)
        metrics, gradient = gradient_of(config, params, batch)
        gradients.append(gradient)
        total, count = metrics["rollout_difference"]
        assert count > 30 and total / count < 1e-5
        assert metrics["ratio_deviation"][0] == 0, "on policy the ratio is exactly 1"
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-9


def gradient_of(config: Any, params: Any, batch: Any) -> tuple[Any, Any]:
    """(metrics, gradient) of the mean loss of a micro-batch."""
    loss = GSPOLoss(config, 0.2, 0.2, "sequence", 1.0, "none")

    def objective(params: Any, batch: Any) -> Any:
        (term,) = loss(params, batch)
        return term.sum / term.count, term.metrics

    (_, metrics), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, batch)
    return metrics, gradient


def test_what_was_encoded_for_the_rollout_trains(policy: tuple[Any, ...], rolled: tuple[Any, ...]) -> None:
    """Features of the rollout in the place of patches: the same gradient of the language model, none of the encoder."""
    config, params, _ = policy
    prompts, _, rollout = rolled
    rng = np.random.default_rng(0)
    responses = [
        Response(trajectory, float(rng.normal()), picture_rows=rollout.pictures.rows[place])
        for place, group in [(3, rollout.groups[3]), (1, rollout.groups[1])]  # as selected, in another order
        for trajectory in group.trajectories
    ]
    sizes = [size_of(prompt.rendered) for prompt in prompts]
    shape = policy_shape(sizes, config, responses=8, samples=4, per_row=2, max_new_tokens=3)
    packed, sources = pack_responses(responses, shape, 2)
    stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], packed)
    read = jax.tree.map(lambda leaf: leaf[0], read_pictures(stacked, rollout.pictures, sources[None]))
    assert read.batch.vision is None and packed.batch.vision is not None
    _, expected = gradient_of(config, params, packed)
    _, gradient = gradient_of(config, params, read)
    for a, b in zip(*(jax.tree.leaves(g["text"]) for g in (gradient, expected)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-9
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["vision"]))


@pytest.mark.parametrize("merger", [0.0, 1.0])
def test_pictures_are_encoded_again_when_the_merger_trains(
    merger: float, policy: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reused features would be those of the weights before the first update, and give the merger no gradient."""
    config, params, processor = policy
    reused: list[bool] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        rollout = roll_out(*args, **kwargs)
        reused.append(rollout.pictures is not None)
        return rollout

    monkeypatch.setattr(rl_train, "roll_out", recording)
    optimizer = replace(FAST, multipliers=(("^vision.*merger", merger), ("^vision", 0.0), (".*", 1.0)))
    settings = replace(SMALL, steps=2, max_new_tokens=1, optimizer=optimizer)
    result = train(settings, config, params, tiny.letters(), processor, tmp_path)
    assert reused == [merger == 0.0] * 2
    moved = any((a != b).any() for a, b in zip(*(
        jax.tree.leaves(p["vision"]["merger"]) for p in (params, result.params)
    ), strict=True))  # fmt: skip
    assert moved == (merger > 0)


def test_learns_with_the_vision_encoder_frozen(policy: tuple[Any, ...], tmp_path: Path) -> None:
    """From a tenth right to most; later updates of a rollout are off policy and clip; nothing compiles on the way."""
    config, params, processor = policy
    settings = replace(
        SMALL, steps=25, samples_per_prompt=8, max_new_tokens=1, optimizer=replace(FAST, learning_rate=1e-2),
        checkpoint_every=100,
    )  # fmt: skip
    counts: list[int] = []

    def evaluate(params: Any) -> dict[str, float]:
        counts.append(len(seen))
        return {"steps_seen": float(len(counts))}

    with compilations() as seen:
        result = train(
            replace(settings, evaluate_every=1), config, params, tiny.letters(), processor, tmp_path, evaluate=evaluate
        )
    assert counts[0] > 0 and counts[1] == counts[-1], "only the first step compiles"
    history = records(tmp_path)
    assert len(history) == 25 and history[-1]["steps_seen"] == 25
    early, late = (np.mean([record["pass@1"] for record in part]) for part in (history[:3], history[-3:]))
    assert early < 0.3 and late > 0.7, (early, late)
    assert history[-1]["entropy"] < history[0]["entropy"]
    assert max(record["clip_low"] + record["clip_high"] for record in history) > 0
    assert max(record["rollout_difference"] for record in history) < 1e-4
    for a, b in zip(*(jax.tree.leaves(p["vision"]) for p in (params, result.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(
        (a != b).any() for a, b in zip(*(jax.tree.leaves(p["text"]) for p in (params, result.params)), strict=True)
    )


class Killed(Exception):
    pass


@pytest.mark.parametrize("moe", [False, pytest.param(True, marks=pytest.mark.prove)])
def test_resumes_to_the_bit(moe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, params, processor = tiny.policy(moe)
    sampled: list[tuple[int, int]] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        sampled.append((kwargs["seed"], kwargs["step"]))
        return roll_out(*args, **kwargs)

    monkeypatch.setattr(rl_train, "roll_out", recording)
    settings = replace(SMALL, steps=5, checkpoint_every=2, evaluate_every=1, max_new_tokens=1, micro_batches=2)
    steps: list[Any] = []

    def kill_at_4(_: Any) -> dict[str, float]:
        steps.append(None)
        if len(steps) == 4:
            raise Killed
        return {}

    def run(workdir: Path, evaluate: Any) -> Any:
        return train(settings, config, params, tiny.letters(), processor, workdir, evaluate=evaluate)

    whole = run(tmp_path / "whole", lambda _: {})
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at_4)
    assert len(records(tmp_path / "killed")) == 3
    resumed = run(tmp_path / "killed", lambda _: {})
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    for a, b in zip(*(jax.tree.leaves(result.params) for result in (whole, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole.steps == resumed.steps == 5
    assert sampled == [(0, step) for step in (0, 1, 2, 3, 4, 0, 1, 2, 3, 2, 3, 4)], "keys follow the step"
    with pytest.raises(ValueError, match=r"rl.eps_low: was 0.2, is 0.1"):
        train(replace(settings, eps_low=0.1), config, params, tiny.letters(), processor, tmp_path / "whole")


def test_stops_when_something_is_not_finite(tmp_path: Path) -> None:
    """The batch is kept for study, and the ruined state is not saved over a good one."""
    config, params, processor = tiny.policy()
    settings = replace(SMALL, steps=5, checkpoint_every=1, max_new_tokens=1, micro_batches=2)
    broken = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), params)
    with pytest.raises(NotFiniteError, match=r"step 1 is not finite .*nan_batch\.npz"):
        train(settings, config, broken, tiny.letters(), processor, tmp_path)
    saved = np.load(tmp_path / "nan_batch.npz")
    assert any(name.endswith("tokens") for name in saved) and any(name.endswith("advantages") for name in saved)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_recipe_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.families=('text_only',)", "data.count=4", "train.steps=1", "train.max_new_tokens=4"]
    main(load_experiment("experiments/gspo.py:debug", overrides), tmp_path, {}, lambda folder: None)  # type: ignore
    assert (tmp_path / "model" / "config.json").is_file() and (tmp_path / "model" / "tokenizer.json").is_file()
    assert "1 steps" in capsys.readouterr().out
    load_experiment("experiments/gspo.py")


def test_bad_settings_are_refused(policy: tuple[Any, ...], tmp_path: Path) -> None:
    config, params, processor = policy
    for change, message in [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"samples_per_prompt": 1}, "at least 2"),
        ({"updates_per_rollout": 3}, "cannot be split over 3 updates"),
        ({"micro_batches": 3}, "into 3 micro_batches"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **change)
    with pytest.raises(ValueError, match="only 3 samples"):
        train(SMALL, config, params, tiny.letters(3), processor, tmp_path)
