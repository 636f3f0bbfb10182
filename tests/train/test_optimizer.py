"""Learning rates and freezing per part, schedules, and updates against their formulas."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.train.optimizer import (
    MUON_MATRICES,
    OptimizerConfig,
    join,
    learning_rate,
    make_optimizer,
    multipliers,
    path_of,
    split_trainable,
)
from mindjax.train.state import TrainState
from tests.train import tiny


def params():
    return tiny.init(tiny.moe_model())


def named(tree):
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_first_match_wins():
    config = OptimizerConfig(multipliers=(("^vision/merger", 0.1), ("^vision", 0.0), (".*", 1.0)))
    factors = named(multipliers(config, params()))
    assert factors["vision/merger/fc1/kernel"] == 0.1
    assert factors["vision/blocks/attn/qkv/kernel"] == 0.0
    assert factors["text/embed"] == 1.0


def test_every_parameter_needs_a_pattern_and_every_pattern_a_parameter():
    with pytest.raises(ValueError, match=r"no learning-rate pattern covers text/embed"):
        multipliers(OptimizerConfig(multipliers=(("^vision", 1.0),)), params())
    with pytest.raises(ValueError, match=r"\['\^visoin'\] decide for no parameter"):
        multipliers(OptimizerConfig(multipliers=(("^visoin", 1.0), (".*", 1.0))), params())
    with pytest.raises(ValueError, match=r"\['text'\] decide for no parameter"):
        multipliers(OptimizerConfig(multipliers=((".*", 1.0), ("text", 0.0))), params())


def test_frozen_parts_have_no_optimizer_state_and_split_joins_back():
    config = OptimizerConfig(multipliers=(("^vision", 0.0), (".*", 1.0)))
    everything = params()
    trainable, frozen = split_trainable(everything, multipliers(config, everything))
    assert set(trainable) == {"text"} and set(frozen) == {"vision"}
    assert jax.tree.structure(join(trainable, frozen)) == jax.tree.structure(everything)
    state = TrainState.create(everything, config, jax.random.key(0))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(trainable)) + 1


def test_masters_are_float32_and_frozen_parts_stay_as_they_came():
    config = OptimizerConfig(multipliers=(("^vision", 0.0), (".*", 1.0)))
    given = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tiny.init(tiny.model()))
    state = TrainState.create(given, config, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params["text"])} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params["vision"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}


def test_schedule():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine", final_fraction=0.1)
    rates = [learning_rate(config, step, 24) for step in range(25)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(rates[14], 0.1 + 0.9 * 0.5)
    np.testing.assert_allclose(rates[24], 0.1)
    linear = OptimizerConfig(learning_rate=2.0, schedule="linear", final_fraction=0.0)
    np.testing.assert_allclose([learning_rate(linear, s, 4) for s in range(5)], [2, 1.5, 1, 0.5, 0])
    assert learning_rate(OptimizerConfig(learning_rate=3.0, schedule="constant"), 100, 10) == 3.0


def test_adamw_is_its_formula_and_decay_spares_norms_biases_and_tables():
    config = OptimizerConfig(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, multipliers=(("^vision", 0.5), (".*", 1.0)))
    everything = params()
    gradient = jax.tree.map(lambda p: jnp.full_like(p, 0.3), everything)
    optimizer = make_optimizer(config, everything)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(everything), everything)
    updates, weights = named(updates), named(everything)
    undecayed = set()
    for name, update in updates.items():
        factor = 0.5 if name.startswith("vision") else 1.0
        # The first step of Adam with a constant gradient is its sign.
        with_decay, without = factor * (1.0 + 0.1 * weights[name]), np.full(update.shape, factor)
        if np.allclose(update, without, rtol=1e-5):
            undecayed.add(name)
        else:
            np.testing.assert_allclose(update, with_decay, rtol=1e-5, err_msg=name)
    small = {name for name in weights if "norm" in name or name.endswith("bias")}
    assert undecayed == small | {"text/embed", "vision/position_embed"}


def test_muon_makes_each_matrix_of_a_stack_orthogonal():
    config = OptimizerConfig(name="muon")
    everything = params()
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape), jnp.float32), everything)
    optimizer = make_optimizer(config, everything)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(everything), everything)
    updates = named(updates)
    matrices = [name for name in updates if jnp.ndim(updates[name]) >= 2 and re.search(MUON_MATRICES, name)]
    assert "text/layers/attn/q" in matrices and "text/layers/moe/down" in matrices and "text/embed" not in matrices
    for name in matrices:
        values = np.linalg.svd(np.asarray(updates[name], np.float64), compute_uv=False)
        scale = 0.2 * np.sqrt(max(updates[name].shape[-2:]))
        # Five Newton-Schulz steps bring singular values near 1, no closer, and tiny ones of a square matrix less.
        assert values.max() < 1.4 * scale and np.median(values) > 0.6 * scale, name
    np.testing.assert_allclose(np.abs(updates["text/embed"]), 1.0, rtol=1e-3)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"name must be 'adamw' or 'muon'.*clip_norm must not be negative"):
        OptimizerConfig(name="adam", clip_norm=-1)


def test_only_what_the_host_uses_is_left_out_of_the_static_part():
    a = OptimizerConfig(learning_rate=1e-3, warmup_steps=5, schedule="linear", final_fraction=0.3)
    assert a.static() == OptimizerConfig(learning_rate=7.0).static()
    assert a.static() != OptimizerConfig(b1=0.8).static()
