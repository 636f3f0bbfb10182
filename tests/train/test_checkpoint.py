"""A checkpoint restores every bit, refuses another configuration, and survives donation of what it saves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.train.checkpoint import Checkpointer, CheckpointError
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


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_damaged_file_is_named_and_the_one_before_is_offered(tmp_path):
    saver = Checkpointer(tmp_path, {})
    for step in (1, 2):
        saver.save(step, replace(state(step), step=jnp.int32(step)))
    saver.close()
    folder = tmp_path / "checkpoints" / "2"
    sealed = [folder / "state" / name for name in json.loads((folder / "manifest.json").read_text())["files"]]
    # All that holds the state, and the manifest; what is left is Orbax's own record of times.
    assert {path.name for path in {*files_of(folder)} - {*sealed}} == {
        "manifest.json", "_CHECKPOINT_METADATA", "commit_success.txt"
    }  # fmt: skip
    assert max(path.stat().st_size for path in sealed) > 100

    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)

    damages = [flip, lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.unlink()]
    for path in [*sealed, folder / "manifest.json"]:
        whole = path.read_bytes()
        for damage in damages:
            damage(path)
            with pytest.raises(CheckpointError) as error:
                Checkpointer(tmp_path, {}).restore(state())
            assert f"the checkpoint of step 2 is damaged: {path} " in str(error.value)
            assert f"That of step 1 is whole: to go on from it, move {folder} away" in str(error.value)
            path.write_bytes(whole)
    assert int(Checkpointer(tmp_path, {}).restore(state()).step) == 2  # put back, it is believed again
    # Following the advice goes on from the older one; with no other left, there is other advice.
    flip(sealed[0])
    flip(tmp_path / "checkpoints" / "1" / "manifest.json")
    with pytest.raises(CheckpointError, match=r"No older one is whole"):
        Checkpointer(tmp_path, {}).restore(state())
    flip(tmp_path / "checkpoints" / "1" / "manifest.json")
    shutil.move(folder, tmp_path / "away")
    assert int(Checkpointer(tmp_path, {}).restore(state()).step) == 1


def test_the_manifest_says_what_the_run_stands_at(tmp_path):
    saver = Checkpointer(tmp_path, {"sft": {"seed": 0}})
    saver.save(5, state(7), {"position": {"prompt": 3}})
    saver.close()
    manifest = json.loads((tmp_path / "checkpoints" / "5" / "manifest.json").read_text())
    assert manifest["step"] == 5 and manifest["extra"] == {"position": {"prompt": 3}}
    assert manifest["identity"] == {"sft": {"seed": 0}}
    assert manifest["key"] == jax.random.key_data(jax.random.key(7)).tolist()
    assert manifest["versions"]["jax"] == jax.__version__ and {"flax", "orbax-checkpoint"} < set(manifest["versions"])
    assert manifest["mesh"] == {} and manifest["processes"] == 1
    reader = Checkpointer(tmp_path, {"sft": {"seed": 0}})
    reader.restore(state())
    assert reader.extra == {"position": {"prompt": 3}}


def test_a_folder_that_cannot_be_made_is_an_error_with_advice(tmp_path):
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"the folder of checkpoints could not be written to .*no older one"):
        Checkpointer(tmp_path, {})
