"""Runs in processes of their own: `python -m tests.train.program COMMAND ...`; each command is a function below."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mindjax.train.checkpoint import Checkpointer
from mindjax.train.loop import Interrupted
from mindjax.train.state import TrainState
from sharding import processes
from sharding.layout import Layout
from tests.train import toy

BIG = 500_000  # random numbers, which do not compress: 2 MB


def heavy() -> TrainState:
    """The toy's state with 2 MB more, which no update changes."""
    rng = np.random.default_rng(1)
    params = {"w": jnp.zeros(3), "z": jnp.asarray(rng.normal(size=BIG), jnp.float32)}
    return TrainState.create(params, replace(toy.CONFIG, weight_decay=0.0), jax.random.key(0))


def kill(workdir: str, where: str = "", at: str = "0") -> None:
    """A run that kills itself: at its step number `at`, or within the save after it, where what is written is there
    but not its seal ("shards"), or all but the last rename ("manifest")."""
    from mindjax.train import seal

    log = Path(workdir) / "executed.txt"
    reached = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def change(_: int, state: TrainState) -> TrainState:
        nonlocal reached
        reached = int(state.step) + 1
        with log.open("a") as file:
            file.write(f"{reached} ")
        if where == "step" and reached == int(at):
            die()
        return state

    def during(name: str, function: Any) -> Any:
        def replaced(*arguments: Any) -> Any:
            if name == "manifest":
                function(*arguments)
            # The background thread of a save: which one it is, the folder says.
            if any(f"{at}.orbax" in str(argument) for argument in arguments):
                die()
            return function(*arguments)

        return replaced

    Path(workdir).mkdir(exist_ok=True)
    if where == "shards":
        seal.hash_files = during("shards", seal.hash_files)
    if where == "manifest":
        seal.write_manifest = during("manifest", seal.write_manifest)
    toy.run(Path(workdir), change=change, steps=20, checkpoint_every=2)


def limited(workdir: str) -> None:
    """A run whose files can grow no further than 1 MB from step 5 on."""

    def limit(number: int) -> None:
        if number == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))

    toy.run(Path(workdir), before=limit, state=heavy(), checkpoint_every=2)


def disk(folder: str) -> None:
    """Runs on a disk of its own that gets full, then read-only; in namespaces of its own."""

    def mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True)

    def expect(*words: str, **options: Any) -> None:
        try:
            toy.run(run, state=heavy(), checkpoint_every=2, **options)
        except ValueError as error:
            assert all(word in str(error) for word in words), error
            print("said:", error)
        else:
            raise AssertionError("nothing was said")

    save = Checkpointer.save

    def save_and_wait(self: Checkpointer, *arguments: Any) -> None:
        save(self, *arguments)
        self.wait()

    Checkpointer.save = save_and_wait  # type: ignore[method-assign]  # so that what is there at a step is certain
    mount("-t", "tmpfs", "-o", "size=24m", "tmpfs", folder)
    root = Path(folder)
    run, filler = root / "run", root / "filler"

    def fill(number: int) -> None:
        if number == 5:
            with filler.open("wb") as file:
                file.write(bytes(os.statvfs(root).f_bavail * 4096 - (1 << 20)))

    expect("the checkpoint of step 6", "That of step 4 is intact", "room", before=fill)
    assert Checkpointer(run, {}).steps() == [2, 4]
    filler.unlink()

    checkpoints = str(run / "checkpoints")

    def protect(number: int) -> None:
        if number == 1:
            mount("--bind", checkpoints, checkpoints)
            mount("-o", "remount,bind,ro", checkpoints)

    expect("the checkpoint of step 6", "Read-only", "That of step 4 is intact", before=protect)
    subprocess.run(["umount", checkpoints], check=True)
    assert Checkpointer(run, {}).steps() == [2, 4]
    result = toy.run(run, state=heavy(), checkpoint_every=2)
    whole = toy.run(root / "whole", state=heavy(), checkpoint_every=2)
    np.testing.assert_array_equal(result.params["w"], whole.params["w"])
    mount("-o", "remount,ro", folder)
    expect("metrics.jsonl", "could not be written: Read-only")


def layouts(workdir: str) -> None:
    """Saves on one mesh and restores onto others and one device; all by all, to the bit."""
    devices = jax.devices()
    kinds = [Layout(), Layout(fsdp=4, data=2), Layout(tensor=8), Layout(stage=2, expert=2, sequence=2)]
    specs = [PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec(None, "tensor"), PartitionSpec("stage", "expert")]
    states = [spread(kind, spec, devices) for kind, spec in zip(kinds, specs, strict=True)]
    expected = plain(states[0])
    for number, state in enumerate(states):
        saver = Checkpointer(Path(workdir) / str(number), {})
        saver.save(5, state)
        saver.close()
        for template in states:
            restored = Checkpointer(Path(workdir) / str(number), {}).restore(blank(template))
            assert restored is not None
            jax.tree.map(np.testing.assert_array_equal, plain(restored), expected)
            for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
                assert got.sharding.is_equivalent_to(want.sharding, got.ndim), (got.sharding, want.sharding)


def table() -> TrainState:
    """A state with a matrix of 8 x 16 and moments that are not zero."""
    rng = np.random.default_rng(0)
    params = {
        "m": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
    }
    state = TrainState.create(params, toy.CONFIG, jax.random.key(3))
    moments = jax.tree.map(lambda x: (x + rng.normal(size=x.shape)).astype(x.dtype), state.opt_state)
    return replace(state, opt_state=moments, step=jnp.int32(5))


def spread(layout: Layout, spec: PartitionSpec, devices: list[jax.Device]) -> TrainState:
    if layout.devices == 1:
        return jax.device_put(table(), devices[0])
    mesh = layout.mesh(devices)
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 2 and x.size == 128 else PartitionSpec())),
        table(),
    )


def blank(state: TrainState) -> TrainState:
    """Of the same structure, shapes and placement, with other values."""
    zeros = jax.tree.map(lambda x: x * 0, replace(state, key=jnp.zeros(())))
    return replace(zeros, key=jax.device_put(jax.random.key(99), state.key.sharding))


def plain(state: TrainState) -> Any:
    return jax.tree.map(np.asarray, replace(state, key=jax.random.key_data(state.key)))


def with_rest() -> TrainState:
    """The toy's state with eight numbers that no update changes, for several devices to share."""
    return TrainState.create({"w": jnp.zeros(3), "z": jnp.zeros(8)}, toy.CONFIG, jax.random.key(0))


def cluster(workdir: str, stop: str = "") -> None:
    """One process of several, two devices each; the one with number `stop` sends itself SIGTERM at its step 5."""
    processes.start()
    mesh = Layout(data=jax.device_count()).mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())

    split = NamedSharding(mesh, PartitionSpec("data"))

    def place(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(everywhere, np.asarray(x)), tree)

    params = jax.tree.map(np.asarray, with_rest().params)
    state = TrainState.create(params, toy.CONFIG, jax.random.key(0), {"w": everywhere, "z": split})

    def before(number: int) -> None:
        if number == 5 and stop == str(jax.process_index()):
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"checkpoint_every": 4, "check_replicas_every": 1}
    try:
        result = toy.run(Path(workdir), state=state, before=before, place=lambda parts: place(parts[0]), **options)
        print("finished", result.steps, np.asarray(result.params["w"]).tobytes().hex())
    except Interrupted as error:
        print("interrupted", error)


def diverge(workdir: str) -> None:
    """Runs on eight devices, each with a copy of everything; one copy is changed before step 6."""
    from mindjax.train.replicas import DivergedError

    mesh = Layout(data=4, fsdp=2).mesh()

    def state() -> TrainState:
        fresh = TrainState.create({"part": {"m": jnp.ones((4, 2))}, "w": jnp.zeros(3)}, toy.CONFIG, jax.random.key(0))
        specs = replace(jax.tree.map(lambda _: PartitionSpec(), fresh), params={"part": {"m": PartitionSpec("fsdp")},
                                                                               "w": PartitionSpec()})  # fmt: skip
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), fresh, specs)

    def corrupt(array: jax.Array, place: int) -> jax.Array:
        copies = [shard.data for shard in array.addressable_shards]
        host = np.array(copies[place])
        host.view(np.uint32).reshape(-1)[1] ^= 1 << 15  # one bit, that later updates do not round away
        copies[place] = jax.device_put(host, copies[place].device)
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, copies)

    def change(number: int, state: TrainState) -> TrainState:
        if number != 6:
            return state
        name, place = ("m", 5) if kind == "split" else ("w", 2)
        params = dict(state.params)
        if name == "m":
            params["part"] = {"m": corrupt(params["part"]["m"], place)}
        else:
            params["w"] = corrupt(params["w"], place)
        return replace(state, params=params)

    honest = toy.run(Path(workdir) / "honest", state=state(), check_replicas_every=1)
    assert honest.steps == toy.STEPS
    for kind, every, found, words in (
        ("split", 1, 6, ("part/m on cpu:5 is", "cpu:1, cpu:3, cpu:7", "after step 5")),
        ("whole", 4, 8, ("w on cpu:2 is", "cpu:6, cpu:7", "after step 4")),
    ):
        folder = Path(workdir) / kind
        try:
            toy.run(folder, state=state(), change=change, check_replicas_every=every, checkpoint_every=2)
        except DivergedError as error:
            print(kind, error)
            assert all(word in str(error) for word in words), error
            assert f"after step {found}," in str(error)
            assert (folder / "diverged_batch.npz").exists()
        else:
            raise AssertionError(f"{kind}: the changed copy was not found")
    kind = "unchecked"
    toy.run(Path(workdir) / kind, state=state(), change=change)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
