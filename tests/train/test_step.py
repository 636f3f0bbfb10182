"""The step: any split into micro-batches gives one gradient, the formula of clipping, one compilation."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.data.packing import BatchShape, pack
from mindjax.sft.train import SFTLoss
from mindjax.train.optimizer import OptimizerConfig, path_of
from mindjax.train.state import TrainState
from mindjax.train.step import TrainStep, eval_step, train_step
from mindjax.types import LossOutput
from tests.train import tiny

PLAIN = OptimizerConfig(clip_norm=0.0)
FROZEN_VISION = OptimizerConfig(clip_norm=0.5, multipliers=(("^vision", 0.0), (".*", 1.0)))


@dataclass(frozen=True)
class Quadratic:
    """Two terms with counts of their own: sum of w x over `mask`, and w squared over `pairs`."""

    def __call__(self, params, batch):
        x, mask, pairs = batch
        first = LossOutput(jnp.sum(params["w"] * x * mask), jnp.sum(mask), {"x": (jnp.sum(x * mask), jnp.sum(mask))})
        second = LossOutput(jnp.sum(params["w"] ** 2) * jnp.sum(pairs), jnp.sum(pairs) * 2)
        return first, second


def gradient_of(loss, params, batches):
    """(gradient, loss, metrics) as a step computes them before clipping."""
    return jax.jit(partial(TrainStep(loss, PLAIN, "float32")._gradient, frozen={}))(params, batches=batches)


def test_terms_are_divided_by_their_own_totals():
    rng = np.random.default_rng(0)
    x, mask, pairs = rng.normal(size=(4, 5)).astype(np.float32), (rng.random((4, 5)) < 0.5).astype(np.float32), None
    pairs = np.array([[1, 0], [1, 1], [0, 0], [1, 1]], np.float32)
    w = {"w": jnp.float32(2.0)}
    gradient, loss, metrics = gradient_of(Quadratic(), w, (x, mask, pairs))
    np.testing.assert_allclose(gradient["w"], (x * mask).sum() / mask.sum() + 2 * 2.0 * 5 / 10, rtol=1e-6)
    np.testing.assert_allclose(loss, 2 * (x * mask).sum() / mask.sum() + 4.0 * 5 / 10, rtol=1e-6)
    np.testing.assert_allclose(metrics["x"][0] / metrics["x"][1], (x * mask).sum() / mask.sum(), rtol=1e-6)


def test_counting_ahead_costs_no_forward_pass():
    def layers(params, batch):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ params["w"]), None), batch, length=8)
        return LossOutput(jnp.sum(x), jnp.float32(batch.shape[0]))

    def flops(micro_batches):
        gradient = partial(TrainStep(layers, PLAIN, "float32")._gradient, frozen={})
        compiled = jax.jit(gradient).lower({"w": jnp.ones((64, 64))}, batches=jnp.ones((micro_batches, 32, 64)))
        return compiled.compile().cost_analysis()["flops"]  # the body of a loop counts once

    assert flops(4) < 1.1 * flops(1)


def test_any_split_gives_the_same_gradient():
    # The mixture of experts has a second term, the router's, with a count of its own.
    config = tiny.moe_model()
    rng = np.random.default_rng(3)
    samples = [tiny.sample(rng, n) for n in (20, 7, 13, 9)]
    params = tiny.init(config)
    gradients = jax.jit(partial(TrainStep(SFTLoss(config, "token", "none"), PLAIN, "float32")._gradient, frozen={}))
    results = []
    for split in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1, 2, 3]]):
        packed = [pack([[samples[i]] for i in part], BatchShape(4, 20)) for part in split]
        results.append(gradients(params, batches=jax.tree.map(lambda *leaves: np.stack(leaves), *packed)))
    whole_gradient, whole_loss, whole_metrics = results[0]
    for gradient, loss, metrics in results[1:]:
        np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(whole_gradient), strict=True
        ):
            assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b) + 1e-9, path_of(path)
        for name, pair in metrics.items():
            if name != "router_peak":  # of a batch, not of a sequence
                np.testing.assert_allclose(np.divide(*pair), np.divide(*whole_metrics[name]), rtol=1e-5, err_msg=name)


def batches(count=2, seed=0, rows=2):
    samples = tiny.samples(count * rows, seed, longest=24)
    packed = [pack([[samples[rows * i + j]] for j in range(rows)], tiny.SHAPE) for i in range(count)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *packed)


def test_a_step_clips_updates_and_compiles_once():
    step = train_step(SFTLoss(tiny.model(), "token", "none"), FROZEN_VISION)
    start = tiny.init(tiny.model())
    state = TrainState.create(start, FROZEN_VISION, jax.random.key(0))
    with jax.transfer_guard("disallow"):
        losses = []
        for i in range(4):
            state, metrics = step(state, batches(seed=0 if i < 3 else 1), 1e-2)
            losses.append(metrics["loss"][0])
    assert step.compilations() == 1, "a step of the same shape compiled again"
    assert int(state.step) == 4 and float(losses[2]) < float(losses[0])
    # The caller's parameters live on, frozen ones are the same, the others moved.
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(state.params), strict=True
    ):
        assert np.array_equal(before, after) == path_of(path).startswith("vision"), path_of(path)


def test_a_step_copies_no_moment():
    """Else every step reads and writes all of the optimizer's state once more."""
    state = TrainState.create(tiny.init(tiny.model()), PLAIN, jax.random.key(0))
    compiled = train_step(SFTLoss(tiny.model(), "token", "none"), PLAIN).lower(state, batches(1)).compile()
    assert not re.findall(r"copy\(%state_opt_state\S*", compiled.as_text())


def test_the_same_loss_and_static_settings_share_a_step():
    loss = SFTLoss(tiny.model(), "token", "none")
    first = train_step(loss, OptimizerConfig(learning_rate=1e-3, warmup_steps=3))
    assert train_step(SFTLoss(tiny.model(), "token", "none"), OptimizerConfig(schedule="linear")) is first
    assert train_step(loss, OptimizerConfig(b2=0.9)) is not first
    assert train_step(replace(loss, average="sample"), OptimizerConfig()) is not first


@pytest.mark.parametrize(("value", "clipped"), [(3.0, 1.0), (0.25, 0.25)])
def test_clipping_scales_to_the_norm_and_leaves_smaller_ones(value, clipped):
    x = np.full((1, 1, 4), value, np.float32)
    batch = (x, np.ones_like(x), np.zeros((1, 1, 1), np.float32))
    optimizer = OptimizerConfig(clip_norm=1.0, b1=0.0, b2=0.0, eps=1.0)
    step = TrainStep(Quadratic(), optimizer, "float32")
    state, metrics = step(TrainState.create({"w": jnp.float32(0.0)}, optimizer, jax.random.key(0)), batch, 1.0)
    np.testing.assert_allclose(metrics["grad_norm"][0], value, rtol=1e-6)
    # Adam without memory: g / (|g| + eps).
    np.testing.assert_allclose(state.params["w"], -clipped / (clipped + 1), rtol=1e-6)


def test_bfloat16_compute_keeps_float32_updates_below_its_spacing():
    loss, start = SFTLoss(tiny.model(), "token", "none"), tiny.init(tiny.model())
    before = np.asarray(start["text"]["embed"])
    moved = {}
    for dtype in ("float32", "bfloat16"):
        state = TrainState.create(start, FROZEN_VISION, jax.random.key(0))
        state, metrics = train_step(loss, FROZEN_VISION, dtype)(state, batches(), 1e-6)
        assert metrics["loss"][0].dtype == jnp.float32
        moved[dtype] = np.asarray(state.params["text"]["embed"]) - before
    # A weight near 0.1 in bfloat16 moves by 4e-4 or not at all.
    assert 0 < np.abs(moved["bfloat16"]).max() < 1e-5
    assert np.linalg.norm(moved["bfloat16"] - moved["float32"]) < 0.5 * np.linalg.norm(moved["float32"])


def test_evaluation_reports_what_a_step_would_without_updating():
    loss, params = SFTLoss(tiny.model(), "token", "none"), tiny.init(tiny.model())
    total, count = eval_step(loss)(params, batches())["nll"]
    state = TrainState.create(params, FROZEN_VISION, jax.random.key(0))
    _, metrics = train_step(loss, FROZEN_VISION)(state, batches(), 0.0)
    np.testing.assert_allclose(total / count, metrics["loss"][0], rtol=1e-6)
