"""Checkpoints: atomic, asynchronous, sharded, sealed with checksums, and resumed to the bit on any layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mindjax.train.state import TrainState

PACKAGES = ("mindjax", "jax", "jaxlib", "flax", "orbax-checkpoint")


class CheckpointError(ValueError):
    """A checkpoint cannot be written or is damaged; the message names the file, what is intact, and what to do."""


class Checkpointer:
    """Saves and restores training states under `<workdir>/checkpoints/<step>`.

    A checkpoint appears by a rename once all of it is written and hashed, so a process killed at any moment leaves
    the previous one intact. With several processes, all of them call every method, and `workdir` is one folder that
    all of them see; each writes the shards that it holds. `manifest.json` in a checkpoint says what it belongs to
    (configuration), where the run stands (step, key, what the caller adds), what wrote it (versions, mesh, processes)
    and the SHA-256 of every file.

    Args:
      workdir: of the run.
      identity: what makes the run the run, as JSON-able nested dicts: a checkpoint is resumed only by an equal one.
        The layout does not belong to it: a state is restored onto any.
      keep: how many checkpoints stay, the latest. An old one goes once the new one is whole.

    Raises:
      CheckpointError: the folder cannot be made.
    """

    def __init__(self, workdir: str | Path, identity: Mapping[str, Any], *, keep: int = 2):
        # Imported here: it takes most of a second, and `import mindjax` must not.
        from orbax import checkpoint as ocp

        from mindjax.train import seal

        self._ocp, self._seal = ocp, seal
        self._identity = json.loads(json.dumps(identity))
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._handler = seal.SealingHandler()
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for kind in (ocp.args.StandardSave, ocp.args.StandardRestore):
            registry.add(seal.STATE, kind, self._handler)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            # Folders are made before `save` returns: made in the background, one that cannot be made is noticed after
            # ten minutes, when the writers stop waiting for it.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._closed = False
        self._under_way: int | None = None
        with self._advice(None):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._folder, options=options, handler_registry=registry)
        self.extra: dict[str, Any] = {}

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, rising."""
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def restore(self, template: TrainState, *, free: bool = False) -> TrainState | None:
        """The newest state, or None where there is none; `extra` is then what was saved with it.

        Every file is read and compared with its checksum first.

        Args:
          template: gives structure, shapes, dtypes and placement, whatever the placement was when it was saved.
          free: whether to free the template's buffers before reading, so that there are never two states.

        Raises:
          CheckpointError: a file is not what was written. Nothing is passed over in silence: the message names the
            file, and the newest older checkpoint that is whole.
          ValueError: the checkpoint was written with another configuration; the message names each field.
        """
        self.wait()
        step = self.latest()
        if step is None:
            return None
        folder = self._folder / str(step)
        try:
            manifest = self._seal.read_manifest(folder)
            self._check(step, manifest["identity"])
            self._seal.verify(folder, manifest)
        except self._seal.Damaged as error:
            raise CheckpointError(self._damaged(step, str(error))) from None
        self.extra = manifest["extra"]
        args, key_impl = self._ocp.args, jax.random.key_impl(template.key)
        target = args.StandardRestore(jax.tree.map(_abstract, _plain(template)))
        if free:
            jax.tree.map(lambda leaf: leaf.delete(), template)
        restored = self._manager.restore(step, args=args.Composite(**{self._seal.STATE: target}))[self._seal.STATE]
        assert manifest["step"] == step == int(restored.step), "a checkpoint disagrees with its own name"
        # Copies that JAX owns: the step donates these buffers, and the reader's may be views of its own memory.
        restored = jax.tree.map(jnp.copy, restored)
        return replace(restored, key=jax.random.wrap_key_data(restored.key, impl=key_impl))

    def save(self, step: int, state: TrainState, extra: Mapping[str, Any] | None = None) -> None:
        """Starts saving; the state may be donated as soon as this returns.

        Orbax copies the shards of this process to host memory before it returns, and writes them in the background.
        (On the CPU it takes a view instead: XLA sees that, and a donated buffer that is still in view is not reused.)
        A save that is still under way is waited for.

        Args:
          extra: what else the run stands at, JSON-able.

        Raises:
          CheckpointError: this or the previous checkpoint could not be written.
        """
        self.wait()
        plain, args = _plain(state), self._ocp.args
        self._handler.manifest = {
            "step": step,
            "extra": dict(extra or {}),
            "key": np.asarray(plain.key).tolist(),
            "mesh": _mesh(state),
            "processes": jax.process_count(),
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "identity": self._identity,
        }
        with self._advice(step):
            self._manager.save(step, args=args.Composite(**{self._seal.STATE: args.StandardSave(plain)}))
        self._under_way = step

    def poll(self) -> None:
        """Raises the error of a save in the background, if it has failed by now; does not wait.

        Raises:
          CheckpointError: see `save`.
        """
        if self._under_way is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns once no save is under way.

        Raises:
          CheckpointError: see `save`.
        """
        step, self._under_way = self._under_way, None
        with self._advice(step):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for a save under way; may be called again."""
        if not self._closed:
            self._closed = True
            self.wait()
            self._manager.close()

    def _check(self, step: int, saved: dict[str, Any]) -> None:
        changes = differences(saved, self._identity)
        if changes:
            raise ValueError(
                f"{self._folder / str(step)} was written by another configuration: {'; '.join(changes)}. "
                "Set these back to resume it, or give another workdir to start afresh."
            )

    def _damaged(self, step: int, problem: str) -> str:
        text = f"the checkpoint of step {step} is damaged: {problem}. "
        for older in reversed([other for other in self.steps() if other < step]):
            folder = self._folder / str(older)
            try:
                self._seal.verify(folder, self._seal.read_manifest(folder))
            except self._seal.Damaged:
                continue
            return text + (
                f"That of step {older} is whole: to go on from it, move {self._folder / str(step)} away and run the "
                "same command"
            )
        return text + "No older one is whole: put back a copy of it, or give another workdir to start afresh"

    @contextmanager
    def _advice(self, step: int | None) -> Iterator[None]:
        """Turns what goes wrong in writing into a `CheckpointError`; without a step it is about the folder."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            what = f"the checkpoint of step {step}" if step is not None else "the folder of checkpoints"
            # The library's text goes from the outermost operation to the innermost, which says what happened.
            reason = ": ".join((str(error) or type(error).__name__).splitlines()[0].split(": ")[-2:])
            kept = self.latest() if self._folder.is_dir() else None
            raise CheckpointError(
                f"{what} could not be written to {self._folder}: {reason}. "
                + ("There is no older one. " if kept is None else f"That of step {kept} is intact. ")
                + "See that the disk has room for one checkpoint more than are kept and that the folder can be "
                "written, then run the same command to go on"
            ) from error


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


def _mesh(state: TrainState) -> dict[str, int]:
    """Axis -> size of the mesh that the state lies on; {} is one device."""
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(state) if isinstance(leaf.sharding, NamedSharding)]
    return dict(meshes[0].shape) if meshes else {}


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of every leaf; lists count as leaves."""
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [pair for key, value in tree.items() for pair in _flatten(value, f"{prefix}.{key}" if prefix else key)]
