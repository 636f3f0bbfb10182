"""DPO: which tokens count, both replies on one image, and a run that learns and resumes."""

from __future__ import annotations

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.data.packing import pack
from mindjax.dpo import train as dpo
from mindjax.dpo.train import DPOConfig, DPOLoss, Pair, max_pairs, pack_pairs, reply_logprobs, train
from mindjax.models import qwen3_vl
from mindjax.train.metrics import read_metrics
from mindjax.train.optimizer import OptimizerConfig
from mindjax.train.spikes import SpikeConfig
from mindjax.types import Sample
from sharding.layout import Layout
from tests.train import tiny

MODEL = tiny.model()
CONFIG = DPOConfig(
    steps=8, rows=2, beta=0.5, optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant"), checkpoint_every=3
)


def pairs(count=4, seed=0):
    """Replies that differ in word and length after one prompt with an image."""
    rng = np.random.default_rng(seed)
    result = []
    for i in range(count):
        chosen = tiny.sample(rng, 12, ((2, 4),))
        worse = tiny.sample(rng, 10 + i % 4, ((2, 4),))
        tokens = np.concatenate([chosen.tokens[:6], worse.tokens[6:]])
        mask = (np.arange(len(tokens)) >= 6).astype(np.float32)
        rejected = replace(worse, tokens=tokens, frames=chosen.frames, loss_mask=mask)
        result.append(Pair(replace(chosen, loss_mask=(np.arange(12) >= 6).astype(np.float32)), rejected))
    return result


def test_packed_pairs_score_as_each_conversation_alone():
    data = pairs()
    packed = pack_pairs([(2,), (0,)], data, tiny.SHAPE, None)
    params = tiny.init(MODEL)
    logprobs = jax.jit(lambda batch: qwen3_vl.token_logprobs(params, MODEL, batch).logp)
    scores = reply_logprobs(logprobs(packed.batch), packed)
    assert scores.shape == (max_pairs(tiny.SHAPE), 2)
    np.testing.assert_array_equal(packed.valid, np.arange(len(packed.valid)) < 2)
    for place, i in enumerate((2, 0)):
        for side, item in enumerate((data[i].chosen, data[i].rejected)):
            alone = pack([[item]], tiny.SHAPE)
            expected = float(jnp.sum(logprobs(alone) * alone.loss_mask))
            np.testing.assert_allclose(scores[place, side], expected, rtol=1e-5)
    # One copy of each image for both replies.
    assert (packed.batch.vision.segment_ids > 0).sum() == 2 * 8


def test_only_the_last_reply_counts():
    mask = np.array([0, 1, 1, 0, 0, 1, 1, 1, 0], np.float32)
    rendered = replace(tiny.sample(np.random.default_rng(0), 9), loss_mask=mask)
    np.testing.assert_array_equal(dpo._last_reply_only(rendered).loss_mask, [0, 0, 0, 0, 0, 1, 1, 1, 0])


def test_render_pair_shares_the_images_and_needs_a_rejected_reply(monkeypatch):
    def render(messages, processor):
        item = tiny.sample(np.random.default_rng(0), 12, ((2, 2),))
        return replace(item, tokens=item.tokens + len(messages[-1]["content"]))

    monkeypatch.setattr(dpo, "render", render)
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "good"})
    pair = dpo.render_pair(Sample(messages, "a", rejected="bad"), None)
    assert pair.chosen.frames is pair.rejected.frames
    assert (pair.chosen.tokens - pair.rejected.tokens == 1).all()
    with pytest.raises(ValueError, match="'a' is no preference pair"):
        dpo.render_pair(Sample(messages, "a"), None)
    with pytest.raises(ValueError, match="'b' is no preference pair"):
        dpo.render_pair(Sample(messages[:1], "b", rejected="bad"), None)


def run(workdir, config=CONFIG):
    return train(config, MODEL, tiny.init(MODEL), pairs(), workdir, shape=tiny.SHAPE)


def test_it_learns_the_preference_and_resumes_to_the_bit(tmp_path, monkeypatch):
    result = run(tmp_path / "whole")
    records = read_metrics(tmp_path / "whole")
    assert records[0]["loss"] > 2 * result.metrics["loss"] and result.metrics["accuracy"] == 1
    assert result.metrics["margin"] == pytest.approx(
        result.metrics["reward_chosen"] - result.metrics["reward_rejected"], rel=1e-4
    )
    original = dpo.pack_pairs
    calls = []

    def crash(*arguments):
        calls.append(1)
        if len(calls) > 6:
            raise OSError("power cut")
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
        patch.setattr(dpo, "pack_pairs", crash)
        run(tmp_path / "crashed")
    run(tmp_path / "crashed")
    keys = ("step", "loss", "margin", "grad_norm")
    assert [[r[k] for k in keys] for r in read_metrics(tmp_path / "crashed")] == [[r[k] for k in keys] for r in records]


def test_with_a_reference_the_first_loss_is_log_two(tmp_path):
    result = run(tmp_path, replace(CONFIG, reference=True, steps=3))
    records = read_metrics(tmp_path)
    np.testing.assert_allclose(records[0]["loss"], np.log(2), rtol=1e-4)
    assert abs(records[0]["reward_chosen"]) < 1e-4
    assert result.metrics["loss"] < records[0]["loss"]


def test_terms_of_the_mixture_of_experts():
    config = tiny.moe_model()
    packed = pack_pairs([(0,), (1,)], pairs(), tiny.SHAPE, None)
    loss, router = jax.jit(DPOLoss(config, 0.1, "none"))(tiny.init(config), packed)
    assert float(loss.count) == 2 and float(router.count) == 4 * 2


CHANGED = {
    "beta": 0.7,
    "reference": True,
    "epochs": 2,
    "steps": 7,
    "rows": 3,
    "length": 96,
    "micro_batches": 2,
    "optimizer": OptimizerConfig(b1=0.5),
    "remat": "full",
    "dtype": "bfloat16",
    "seed": 5,
    "drop_too_long": True,
    "checkpoint_every": 9,
    "keep_checkpoints": 5,
    "layout": Layout(fsdp=2),
    "spikes": SpikeConfig("skip"),
    "check_replicas_every": 2,
}


def test_every_setting_changes_something(monkeypatch, tmp_path):
    seen = []

    def capture(step, state, loader, *, identity, **options):
        batches = [loader.indices(i) for i in range(len(loader))]
        first = loader[0][0][0]
        seen.append(repr((step._loss_fn, step._dtype, step._config, first.batch.tokens.shape, batches, options)))
        seen[-1] += repr((first.reference is None, loader.dropped))

    monkeypatch.setattr("mindjax.dpo.train.fit", capture)
    assert set(CHANGED) == {field.name for field in fields(DPOConfig)}

    def observe(config, data=None):
        train(config, MODEL, tiny.init(MODEL), data or pairs(8), tmp_path)
        return seen[-1]

    base = observe(CONFIG)
    for name, value in CHANGED.items():
        if name == "layout":
            with pytest.raises(ValueError, match="takes 2 devices"):
                observe(replace(CONFIG, layout=value))
        elif name == "drop_too_long":
            long = tiny.sample(np.random.default_rng(0), 40)
            with pytest.raises(ValueError, match="do not fit"):
                observe(replace(CONFIG, length=64), [*pairs(8), Pair(long, long)])
            assert "(8,)" in observe(replace(CONFIG, length=64, drop_too_long=True), [*pairs(8), Pair(long, long)])
        else:
            changes = {name: value, **({"steps": None} if name == "epochs" else {})}
            assert observe(replace(CONFIG, **changes)) != base, f"{name} changes nothing"
