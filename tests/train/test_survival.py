"""A run goes on from its newest checkpoint to the bit, whatever ended it: kills, full disks, signals, other layouts."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mindjax.train.checkpoint import Checkpointer
from mindjax.train.metrics import read_metrics
from tests.sft.test_train import CONFIG, run
from tests.train import program, toy

ROOT = Path(__file__).resolve().parents[2]
STEPS = 1000  # of the real run


def start(
    *arguments: object, devices: int = 1, prefix: tuple[str, ...] = (), **environment: object
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "tests.train.program", *map(str, arguments)],
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            **{name: str(value) for name, value in environment.items()},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    try:
        output, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, error[-4000:]
    return output, error


def steps_of(workdir: Path) -> list[int]:
    """The complete checkpoints."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def test_kill_9_loses_what_came_after_the_last_finished_save_and_no_more(tmp_path: Path) -> None:
    """At a step; in a save once its numbers are written; in a save when only the rename is missing."""
    killed, newest = tmp_path / "killed", 0
    for where, at in (("step", 7), ("shards", 10), ("manifest", 14)):
        finish(start("kill", killed, where, at), -signal.SIGKILL)
        left = steps_of(killed)
        assert left and left[-1] >= newest, "a finished checkpoint is gone"
        newest = left[-1]
        if where != "step":
            assert newest == at - 2, "a checkpoint that was killed in its making counts, or one before it does not"
            assert (killed / "checkpoints" / f"{at}.orbax-checkpoint-tmp").exists(), "the kill missed the save"
    finish(start("kill", killed))
    executed = list(map(int, (killed / "executed.txt").read_text().split()))
    starts = [step for before, step in itertools.pairwise(executed) if step != before + 1]
    # Each process began behind the newest checkpoint that the one before it left; at most a step was saved meanwhile.
    assert len(starts) == 3 and starts[1:] == [9, 13] and starts[0] in (5, 7)
    whole = toy.run(tmp_path / "whole", steps=20, checkpoint_every=2)
    last = Checkpointer(killed, {}).restore(toy.fresh())
    assert last is not None and int(last.step) == 20
    np.testing.assert_array_equal(last.params["w"], whole.params["w"])
    assert toy.losses(killed) == toy.losses(tmp_path / "whole")


def start_sft(workdir: Path) -> subprocess.Popen[str]:
    code = "import sys; from tests.train.test_survival import sft; sft(sys.argv[1])"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(workdir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def sft(workdir: str | Path) -> Any:
    return run(Path(workdir), replace(CONFIG, steps=STEPS, checkpoint_every=3, keep_checkpoints=3))


def until(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Waits for what another process is to write; it must not end first."""
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.0005)


@pytest.mark.prove
def test_kill_9_at_twenty_moments_of_a_real_run(tmp_path: Path) -> None:
    """Five while it starts, five after a random number of steps, ten when a save has begun or a little later."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process, began = start_sft(whole), time.monotonic()
    until(process, lambda: len(read_metrics(whole)) > 0)
    startup = time.monotonic() - began
    finish(process)
    newest, during = 0, 0
    for moment in range(20):
        before = {path.name for path in (killed / "checkpoints").glob("*tmp*")}
        process = start_sft(killed)
        if moment % 2:
            until(process, lambda: {path.name for path in (killed / "checkpoints").glob("*tmp*")} - before)  # noqa: B023
            time.sleep(random.uniform(0, 0.01))
        elif moment % 4:
            goal = newest + random.randint(1, 40)
            until(process, lambda: len(read_metrics(killed)) >= goal)  # noqa: B023
        else:
            time.sleep(random.uniform(0, startup))
        process.kill()
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"it ended before it could be killed: {error}"
        during += any((killed / "checkpoints").glob("*tmp*"))
        # The first line of the log is the first step of this process: the one behind the newest checkpoint.
        if first := re.search(rf"^sft (\d+)/{STEPS}", error, re.MULTILINE):
            assert int(first[1]) == newest + 1, "it did not go on from the newest checkpoint"
        left = steps_of(killed)
        assert not left or left[-1] >= newest, "a finished checkpoint is gone"
        assert len(left) >= min(newest // 3, 3), "more checkpoints are gone than were to go"
        newest = left[-1] if left else 0
        done = len(read_metrics(killed))
        assert done - newest <= 2 * 3, "more is lost than what came after the save before the one under way"
    assert during >= 5, "the kills missed the saves"
    _, error = finish(start_sft(killed))
    assert f"sft {newest + 1}/{STEPS}" in error
    final = [json.loads((path / "checkpoints" / str(STEPS) / "manifest.json").read_text()) for path in (whole, killed)]
    assert final[0]["step"] == final[1]["step"] == STEPS
    compare = ("step", "loss", "grad_norm", "tokens", "learning_rate")
    records = [[{name: r[name] for name in compare} for r in read_metrics(path)] for path in (whole, killed)]
    assert records[0] == records[1] and len(records[0]) == STEPS
    results = [sft(path) for path in (whole, killed)]  # both are finished: only restored
    jax.tree.map(np.testing.assert_array_equal, results[0].params, results[1].params)


def test_a_write_that_fails_in_the_background_ends_the_run_and_spares_what_is_there(tmp_path: Path) -> None:
    """With a limit on the size of a file, which every user can set."""
    _, error = finish(start("limited", tmp_path), 1)
    kept = steps_of(tmp_path)[-1]
    (said,) = re.findall(r"CheckpointError: (.*)", error)
    assert re.match(rf"the checkpoint of step {kept + 2} could not be written to .*File too large", said)
    assert f"That of step {kept} is intact" in said and "then run the same command" in said
    result = toy.run(tmp_path, state=program.heavy(), checkpoint_every=2)
    whole = toy.run(tmp_path / "whole", state=program.heavy())
    np.testing.assert_array_equal(result.params["w"], whole.params["w"])
    assert toy.losses(tmp_path) == toy.losses(tmp_path / "whole")


def test_full_and_read_only_disks(tmp_path: Path) -> None:
    """On a small disk in memory, mounted in namespaces of its own, which takes no rights where the kernel allows it."""
    prefix = ("unshare", "--map-root-user", "--mount")
    probe = [*prefix, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this machine lets its users mount nothing, not even for themselves")
    output, _ = finish(start("disk", tmp_path, prefix=prefix))
    said = [line for line in output.splitlines() if line.startswith("said:")]
    assert len(said) == 3 and "No space left on device" in said[0]


def test_a_state_is_restored_on_any_layout_and_on_one_device_to_the_bit(tmp_path: Path) -> None:
    finish(start("layouts", tmp_path, devices=8))
    expected = program.plain(program.table())
    for number in range(4):  # written on one device, and on three meshes
        restored = Checkpointer(tmp_path / str(number), {}).restore(program.blank(program.table()))
        assert restored is not None
        for got, want in zip(*map(jax.tree.leaves, (program.plain(restored), expected)), strict=True):
            np.testing.assert_array_equal(got, want)
    manifest = json.loads((tmp_path / "1" / "checkpoints" / "5" / "manifest.json").read_text())
    assert manifest["mesh"]["fsdp"] == 4 and manifest["mesh"]["data"] == 2 and manifest["processes"] == 1


def test_processes_stop_together_and_another_number_of_them_goes_on(tmp_path: Path) -> None:
    """A signal reaches one of two processes; one process goes on, crashes, and two finish."""

    def cluster(stop: str = "") -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        jobs = [
            start("cluster", tmp_path, stop, devices=2, MINDJAX_COORDINATOR=address, MINDJAX_PROCESSES=2,
                  MINDJAX_PROCESS_ID=number) for number in range(2)
        ]  # fmt: skip
        return [finish(job)[0].strip().splitlines()[-1] for job in jobs]

    def crash(number: int) -> None:
        if number == 4:
            raise OSError("power cut")

    assert cluster(stop="1") == [
        f"interrupted stopped after step 6 of 10, saved in {tmp_path}; run the same command to go on"
    ] * 2  # fmt: skip
    manifest = json.loads((tmp_path / "checkpoints" / "6" / "manifest.json").read_text())
    assert manifest["processes"] == 2 and manifest["mesh"]["data"] == 4
    # The first process holds one copy of what is whole everywhere, and writes that; the second its part of the rest.
    assert any("ocdbt.process_1" in name for name in manifest["files"]), "the second process wrote no shard"
    with pytest.raises(OSError, match="power cut"):
        toy.run(tmp_path, state=program.with_rest(), before=crash, checkpoint_every=8)
    whole = toy.run(tmp_path / "whole", state=program.with_rest())
    assert cluster() == [f"finished 10 {np.asarray(whole.params['w']).tobytes().hex()}"] * 2
    assert toy.losses(tmp_path) == toy.losses(tmp_path / "whole")
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 11))
