"""A checkpoint restores every bit, refuses another configuration, and survives donation of what it saves."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.train.checkpoint import Checkpointer
from mindjax.train.optimizer import OptimizerConfig
from mindjax.train.state import TrainState

CONFIG = OptimizerConfig(multipliers=(("frozen", 0.0), (".*", 1.0)))


def state(seed=0):
    rng = np.random.default_rng(seed)
    params = {"a": {"w": jnp.array(rng.normal(size=(3, 4)), jnp.float32)}, "frozen": jnp.ones((2,), jnp.bfloat16)}
    fresh = TrainState.create(params, CONFIG, jax.random.key(seed))
    moments = jax.tree.map(lambda x: (x + rng.normal()).astype(x.dtype), fresh.opt_state)
    return replace(fresh, opt_state=moments, step=jnp.int32(5))


def plain(tree):
    return jax.tree.map(np.asarray, replace(tree, key=jax.random.key_data(tree.key)))


def test_every_bit_comes_back_and_the_newest_wins(tmp_path):
    saver = Checkpointer(tmp_path, {"lr": 1.0}, keep=2)
    for step in (1, 2, 3):
        saver.save(step, replace(state(step), step=jnp.int32(step)))
    saver.close()
    saver.close()
    reader = Checkpointer(tmp_path, {"lr": 1.0})
    restored = reader.restore(state(0))
    expected = replace(state(3), step=jnp.int32(3))
    jax.tree.map(np.testing.assert_array_equal, plain(restored), plain(expected))
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    assert restored.params["frozen"].dtype == jnp.bfloat16
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    assert Checkpointer(tmp_path / "empty", {}).restore(state()) is None


def test_donating_the_saved_state_does_not_change_what_is_saved(tmp_path):
    saver = Checkpointer(tmp_path, {})
    expected, current = plain(state(1)), state(1)
    overwrite = jax.jit(lambda s: replace(s, params=jax.tree.map(lambda x: x * 0 - 7, s.params)), donate_argnums=0)
    saver.save(5, current)
    for _ in range(3):
        current = overwrite(current)
    jax.block_until_ready(current)
    saver.close()
    jax.tree.map(np.testing.assert_array_equal, plain(Checkpointer(tmp_path, {}).restore(state(0))), expected)


def test_another_configuration_is_refused_by_field(tmp_path):
    saver = Checkpointer(tmp_path, {"sft": {"rows": 8, "seed": 0, "average": "token"}, "model": {"layers": 2}})
    saver.save(5, state())
    saver.close()
    other = Checkpointer(tmp_path, {"sft": {"rows": 4, "seed": 0}, "model": {"layers": 2}})
    with pytest.raises(ValueError, match=r"sft\.average: was 'token', is '\(absent\)'; sft\.rows: was 8, is 4\. Set"):
        other.restore(state())


def test_what_a_killed_save_left_is_not_taken_for_a_checkpoint(tmp_path):
    saver = Checkpointer(tmp_path, {})
    saver.save(5, state(1))
    saver.close()
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    again = Checkpointer(tmp_path, {})
    assert again.latest() == 5
    again.save(6, replace(state(2), step=jnp.int32(6)))
    again.close()
    assert Checkpointer(tmp_path, {}).latest() == 6
