"""SFT learns, is the same run after any kill, and later stages compile nothing."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from mindjax.data.packing import pack
from mindjax.losses.sft import sft_loss
from mindjax.models import qwen3_vl
from mindjax.sft.train import SFTConfig, SFTLoss, choose_shape, train
from mindjax.train.metrics import read_metrics
from mindjax.train.optimizer import OptimizerConfig
from mindjax.train.spikes import SpikeConfig
from mindjax.train.step import train_step
from sharding.layout import Layout
from tests.train import tiny

ROOT = Path(__file__).resolve().parents[2]
CONFIG = SFTConfig(
    steps=24,
    rows=2,
    micro_batches=2,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    checkpoint_every=2,
)


def run(workdir, config=CONFIG, **options):
    options = {"shape": tiny.SHAPE, **options}
    return train(config, tiny.model(), tiny.init(tiny.model()), tiny.samples(12), workdir, **options)


def losses(workdir):
    return [(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in read_metrics(workdir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    return run(workdir), losses(workdir)


def test_it_learns_what_it_is_shown(whole):
    result, records = whole
    assert [r[0] for r in records] == list(range(1, 25))
    assert np.mean([r[1] for r in records[-3:]]) < 0.7 * records[0][1]
    assert result.steps == 24 and result.tokens == sum(r[3] for r in records)


CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.sft.test_train import run
run(sys.argv[1])
"""


def start(workdir):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(workdir), str(ROOT)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when(process, condition, seconds=120.0):
    """Kills with SIGKILL as soon as the condition holds; it must come before the process ends."""
    deadline = time.monotonic() + seconds
    try:
        while not condition():
            assert process.poll() is None, f"it ended before it could be killed: {process.stderr.read()}"
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.001)
    finally:
        process.kill()
        process.communicate()


def unfinished(checkpoints):
    """The half-written checkpoints, by name and inode, so that a new one is told from one a kill left."""
    found = set()
    for path in checkpoints.glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def test_kill_at_any_moment_changes_no_bit(whole, tmp_path):
    _, records = whole
    step, checkpoints = random.randint(3, 12), tmp_path / "checkpoints"
    # At a random step, and then in the middle of a save.
    kill_when(start(tmp_path), lambda: len(read_metrics(tmp_path)) >= step)
    assert 0 < len(read_metrics(tmp_path)) < 24
    left = unfinished(checkpoints)
    kill_when(start(tmp_path), lambda: unfinished(checkpoints) - left)
    assert unfinished(checkpoints), "the kill missed the save"
    run(tmp_path)
    assert losses(tmp_path) == records


def test_sigterm_saves_and_says_how_to_go_on(whole, tmp_path):
    _, records = whole
    process = start(tmp_path)
    while len(read_metrics(tmp_path)) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and "run the same command to go on" in error
    run(tmp_path)
    assert losses(tmp_path) == records


def test_a_resume_with_another_setting_names_it(whole, tmp_path):
    run(tmp_path, replace(CONFIG, steps=2))
    with pytest.raises(ValueError, match=r"sft\.optimizer\.learning_rate: was 0\.01, is 0\.001"):
        run(tmp_path, replace(CONFIG, steps=2, optimizer=replace(CONFIG.optimizer, learning_rate=1e-3)))
    with pytest.raises(ValueError, match=r"data\.difficulty: was None"):
        run(tmp_path, replace(CONFIG, steps=2), difficulty=[1.0] * 12)


def test_stages_of_one_shape_share_a_compiled_step(whole, tmp_path):
    step = train_step(SFTLoss(tiny.model(), "token", "none"), CONFIG.optimizer, "float32")
    assert step.compilations() == 1
    later = replace(CONFIG, steps=3, optimizer=replace(CONFIG.optimizer, learning_rate=1e-4, schedule="linear"))
    result = run(tmp_path, later, difficulty=list(range(12)), held_out=tiny.samples(3, seed=9))
    assert step.compilations() == 1
    assert np.isfinite(result.metrics["held_out_nll"])


def test_the_loss_is_the_models_and_the_router_adds_its_coefficient():
    samples = tiny.samples(4, longest=16)
    batch = pack([samples[:2], samples[2:]], tiny.SHAPE)
    config = tiny.moe_model()
    params = tiny.init(config)
    out = jax.jit(lambda params, batch: qwen3_vl.token_logprobs(params, config, batch))(params, batch)
    main, router = jax.jit(SFTLoss(config, "sample", "none"))(params, batch)
    expected = sft_loss(out.logp, batch.loss_mask, segment_ids=batch.segment_ids, average="sample")
    np.testing.assert_allclose(main.sum, expected.sum, rtol=1e-6)
    assert float(main.count) == 4
    np.testing.assert_allclose(router.sum, 0.001 * np.sum(out.router.aux_sum), rtol=1e-6)
    assert float(router.count) == 4 * 2  # sequences x layers


def test_shape_follows_the_samples_unless_given():
    samples = tiny.samples(8)
    shape = choose_shape(CONFIG, tiny.model(), samples)
    assert (shape.rows, shape.length, shape.vision_length) == (2, 64, 16)
    given = choose_shape(replace(CONFIG, length=32, vision_rows=7, vision_length=32), tiny.model(), samples)
    assert (given.length, given.vision_rows, given.vision_length) == (32, 7, 32)


CHANGED = {
    "epochs": 2,
    "steps": 7,
    "rows": 3,
    "length": 96,
    "vision_rows": 9,
    "vision_length": 32,
    "micro_batches": 1,
    "average": "sample",
    "optimizer": OptimizerConfig(b1=0.5),
    "remat": "full",
    "dtype": "bfloat16",
    "seed": 5,
    "drop_too_long": True,
    "checkpoint_every": 9,
    "keep_checkpoints": 5,
    "evaluate_every": 3,
    "layout": Layout(fsdp=2),
    "spikes": SpikeConfig("skip"),
    "check_replicas_every": 2,
}


def test_every_setting_changes_something(monkeypatch, tmp_path):
    seen = []

    def capture(step, state, loader, *, identity, evaluate, **options):
        batches = [loader.indices(i) for i in range(len(loader))]
        seen.append(repr((step._loss_fn, step._dtype, step._config, loader[0][0][0].tokens.shape, batches, options)))
        seen[-1] += repr(loader[0][0][0].vision.patches.shape) + repr(loader.dropped)

    monkeypatch.setattr("mindjax.sft.train.fit", capture)
    assert set(CHANGED) == {field.name for field in fields(SFTConfig)}

    def observe(config, samples=None):
        train(config, tiny.model(), tiny.init(tiny.model()), samples or tiny.samples(12), tmp_path)
        return seen[-1]

    base = observe(CONFIG)
    for name, value in CHANGED.items():
        if name == "layout":
            with pytest.raises(ValueError, match="takes 2 devices"):
                observe(replace(CONFIG, layout=value))
        elif name == "drop_too_long":
            long = [*tiny.samples(12), tiny.sample(np.random.default_rng(0), 80)]
            with pytest.raises(ValueError, match="do not fit"):
                observe(replace(CONFIG, length=64), long)
            assert "(12,)" in observe(replace(CONFIG, length=64, drop_too_long=True), long)
        else:
            changes = {name: value, **({"steps": None} if name == "epochs" else {})}
            assert observe(replace(CONFIG, **changes)) != base, f"{name} changes nothing"
