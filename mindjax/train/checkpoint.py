"""Checkpoints: atomic, asynchronous, and resumed to the bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.train.state import TrainState


class Checkpointer:
    """Saves and restores training states under `<workdir>/checkpoints/<step>`.

    A checkpoint appears by a rename once all of it is written, so a process killed at any moment leaves the previous
    one intact. It holds the state (parameters, optimizer, step, key), the data position, and the configuration.

    Args:
      workdir: of the run.
      identity: what makes the run the run, as JSON-able nested dicts: a checkpoint is resumed only by an equal one.
      keep: how many checkpoints stay, the latest.
    """

    def __init__(self, workdir: str | Path, identity: Mapping[str, Any], *, keep: int = 2):
        # Imported here: it takes most of a second, and `import mindjax` must not.
        from orbax import checkpoint as ocp

        self._ocp = ocp
        self._identity = json.loads(json.dumps(identity))
        self._folder = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._closed = False
        self.extra: dict[str, Any] = {}

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def restore(self, template: TrainState) -> TrainState | None:
        """The newest state, or None where there is none; `extra` is then what was saved with it.

        Args:
          template: gives structure, shapes, dtypes and placement.

        Raises:
          ValueError: the checkpoint was written with another configuration; the message names each field.
        """
        step = self.latest()
        if step is None:
            return None
        args = self._ocp.args
        saved = self._manager.restore(step, args=args.Composite(run=args.JsonRestore()))["run"]
        self._check(step, saved["identity"])
        self.extra = saved.get("extra", {})
        restored = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(jax.tree.map(_abstract, _plain(template))))
        )["state"]
        assert saved["step"] == step == int(restored.step), "a checkpoint disagrees with its own name"
        # Copies that JAX owns: the step donates these buffers, and the reader's may be views of its own memory.
        restored = jax.tree.map(jnp.copy, restored)
        return replace(restored, key=jax.random.wrap_key_data(restored.key, impl=jax.random.key_impl(template.key)))

    def save(self, step: int, state: TrainState, extra: Mapping[str, Any] | None = None) -> None:
        """Starts saving; the state may be donated as soon as this returns.

        Args:
          extra: what else the run stands at, JSON-able.
        """
        args = self._ocp.args
        # A copy in host memory: the writer works while later steps already reuse the state's buffers.
        host = jax.tree.map(lambda x: np.array(x, copy=True), _plain(state))
        run = {"identity": self._identity, "step": step, "extra": dict(extra or {})}
        self._manager.save(step, args=args.Composite(state=args.StandardSave(host), run=args.JsonSave(run)))

    def close(self) -> None:
        """Waits for a save under way; may be called again."""
        if not self._closed:
            self._closed = True
            self._manager.wait_until_finished()
            self._manager.close()

    def _check(self, step: int, saved: dict[str, Any]) -> None:
        changes = differences(saved, self._identity)
        if changes:
            raise ValueError(
                f"{self._folder / str(step)} was written by another configuration: {'; '.join(changes)}. "
                "Set these back to resume it, or give another workdir to start afresh."
            )


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two nested dicts, each with its dotted name; lists count as values."""
    old, new, absent = dict(_flatten(was)), dict(_flatten(now)), "(absent)"
    return [
        f"{name}: was {old.get(name, absent)!r}, is {new.get(name, absent)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent) != new.get(name, absent)
    ]


def _plain(state: TrainState) -> TrainState:
    """The state with its key as integers, which is what files can hold."""
    return replace(state, key=jax.random.key_data(state.key))


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of every leaf; lists count as leaves."""
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [pair for key, value in tree.items() for pair in _flatten(value, f"{prefix}.{key}" if prefix else key)]
