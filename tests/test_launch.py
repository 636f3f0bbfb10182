"""`mindjax launch`: a real job of two processes over loopback, and how it ends when one of them does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mindjax import launch

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = [sys.executable, "-m", "mindjax.cli", "launch", "--processes", "2"]


def job(*command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A job to its end; one that does not end in a minute is a failure."""
    return subprocess.run(
        [*LAUNCH, *options, "--", "python", "-m", *command], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_processes_compute_together_and_every_line_says_whose_it_is() -> None:
    done = job("tests.launched", "8", options=("--devices-per-process", "2"))
    assert done.returncode == 0, done.stderr
    # Eight steps of x + sum(x) % 7 from 0, 1, 2, 3, where the sum is over the devices of both processes.
    values = [0.0, 1.0, 2.0, 3.0]
    for _ in range(8):
        total = sum(values) % 7
        values = [value + total for value in values]
    lines = set(done.stdout.splitlines())
    assert f"[0] several True first True devices 4 values {values[:2]}" in lines
    assert f"[1] several True first False devices 4 values {values[2:]}" in lines
    assert all(line[:4] in ("[0] ", "[1] ") for line in [*done.stdout.splitlines(), *done.stderr.splitlines()])


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_fails_ends_the_job_and_is_named(process: int) -> None:
    done = job("tests.launched", "1000000000", "raise", str(process))
    assert done.returncode == 1
    report = done.stderr[done.stderr.index("mindjax launch:") :]
    assert f"process {process} of 2 ended with exit status 1" in report
    assert "  RuntimeError: something broke" in report.splitlines()


def test_a_process_that_is_killed_ends_the_job() -> None:
    done = job("tests.launched", "1000000000", "SIGKILL", "1", options=("--timeout", "5"))
    assert done.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 ended with signal SIGKILL" in done.stderr
    assert "  step 5 of 1" in done.stderr.splitlines()


@pytest.mark.parametrize("process", [pytest.param(0, marks=pytest.mark.prove), 1])
def test_a_process_that_is_stopped_ends_the_job(process: int) -> None:
    """It exits never and closes no connection: only its heartbeats stay away."""
    done = job("tests.launched", "1000000000", "SIGSTOP", str(process), options=("--timeout", "5"))
    assert done.returncode == 128 + signal.SIGABRT
    assert (
        f"process {1 - process} of 2 ended with signal SIGABRT, for process {process} was not heard of" in done.stderr
    )


def test_a_process_that_hangs_with_its_heart_beating_ends_the_job() -> None:
    done = job("tests.launched", "1000000000", "hang", "1", options=("--step-timeout", "3"))
    assert done.returncode == 124
    assert "no step has finished for 3 s" in done.stderr
    # The stack of the process that does hang is there, not only that of the one that waits for it.
    assert any(line.startswith("[1]") and "tests/launched.py" in line for line in done.stderr.splitlines())


def test_sigterm_reaches_every_process_and_the_job_waits_for_them() -> None:
    command = [*LAUNCH, "--", "python", "-m", "tests.launched", "100", "wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as running:
        assert running.stdout is not None
        waiting = set()
        while len(waiting) < 2:
            line = running.stdout.readline()
            assert line, "the job ended early"
            if "waits" in line:
                waiting.add(line[:3])
        running.send_signal(signal.SIGTERM)
        rest, _ = running.communicate(timeout=30)
    assert running.returncode == 0
    assert {f"[{n}] process {n} was asked to end" for n in (0, 1)} <= set(rest.splitlines())


@pytest.mark.parametrize("layout", ["data=2,expert=2,tensor=2", "stage=2,expert=4"])
def test_each_process_places_its_own_shards_of_a_batch(layout: str) -> None:
    done = job("tests.data.placing", layout, options=("--devices-per-process", "4"))
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("[0] {"))
    result = json.loads(line[4:])
    assert result["processes"] == 2 and result["wrong"] == [] and result["split"] and result["rows"] == 2
    assert result["seen"] > 10_000  # there was something to compare
    # Processes split the outermost axis: data here, so each needs half; stage there, so both need every row.
    assert result["mine"] == ([0, 1] if layout.startswith("data") else [0, 1, 2, 3])


def test_status_and_environment_of_one_process(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_enable_fast_math=false")
    program = "import os, sys; print(os.environ['XLA_FLAGS'], os.environ['MINDJAX_PROCESSES']); sys.exit(7)"
    assert launch.main(["python", "-c", program], 1, devices=3) == 7
    out, error = capfd.readouterr()
    assert out == "[0] --xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=3 1\n"
    assert "process 0 of 1 ended with exit status 7" in error
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # handlers are put back
    assert "MINDJAX_PROCESSES" not in os.environ


def test_the_process_that_failed_by_itself_is_named_where_several_have() -> None:
    lost = "echo 'ValueError: UNKNOWN: Gloo all-reduce failed: Connection closed by peer'; exit 1"
    programs = ("kill -ABRT $$", lost, "exit 3")
    workers = [launch.Worker(number, ["sh", "-c", text], dict(os.environ)) for number, text in enumerate(programs)]
    for worker in workers:
        worker.process.wait()
    failed = launch._wait(workers)
    assert failed is not None and failed.number == 2


def test_mistakes_are_answered() -> None:
    with pytest.raises(ValueError, match="no such command: 'no-such-program'"):
        launch.main(["no-such-program"], 2)
    with pytest.raises(ValueError, match="give a command: mindjax launch"):
        launch.main([], 2)
    with pytest.raises(ValueError, match="all must be 1 or more"):
        launch.main(["python"], 0)
