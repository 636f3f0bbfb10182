"""`mindjax launch`: a command as a job of several processes on this machine, over loopback, each with CPU devices."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from sharding import processes, watchdog

POLL_SECONDS = 0.05
# From when one has failed until the others are killed: they cannot finish, but may print why.
GRACE_SECONDS = 5.0
LAST_LINES = 20


class Worker:
    """One process of the job; what it prints is passed on line by line, with its number in front.

    Args:
      number: of the process.
      command: with its arguments.
      environment: of the process.
    """

    def __init__(self, number: int, command: Sequence[str], environment: dict[str, str]):
        self.number = number
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        # A session of its own: a terminal's Ctrl-C would reach it twice, from there and from here.
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        pairs = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self._readers = [threading.Thread(target=self._pass_on, args=pair, daemon=True) for pair in pairs]
        for reader in self._readers:
            reader.start()

    def _pass_on(self, source: IO[str], sink: IO[str]) -> None:
        for line in source:
            self.last.append(line.rstrip("\n"))
            sink.write(f"[{self.number}] {line.rstrip()}\n")  # one write: lines of others do not come between
            sink.flush()

    def signal(self, number: int) -> None:
        """To the process and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stopped(self) -> bool:
        """Whether a signal such as SIGSTOP holds it."""
        return os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None

    def drain(self) -> None:
        """Returns when all that it printed is passed on, or a child of its own holds its output open."""
        for reader in self._readers:
            reader.join(timeout=1.0)


def main(
    command: Sequence[str],
    count: int,
    *,
    devices: int = 1,
    timeout: int = 30,
    step_timeout: int = 0,
) -> int:
    """Runs the command in every process and waits for all of them.

    Ctrl-C and SIGTERM are passed on. When one process fails, the others are given `GRACE_SECONDS` and killed; after a
    signal, once the first has ended, `timeout`.

    Args:
      command: with its arguments; `mindjax` and `python` are those of this installation. It calls
        `sharding.processes.start`, as `mindjax` does.
      count: processes.
      devices: CPU devices of each.
      timeout: seconds after which a process that is dead or stopped ends the job.
      step_timeout: see `sharding.watchdog`; 0 is no limit.

    Returns:
      0, or the status of the process that failed first, 128 + N for signal N.

    Raises:
      ValueError: no such command, or a number below 1.
    """
    if min(count, devices, timeout) < 1 or step_timeout < 0:
        raise ValueError(f"{count} processes, {devices} devices and a timeout of {timeout} s: all must be 1 or more")
    environment = {**os.environ, "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])}
    if not command or not shutil.which(command[0], path=environment["PATH"]):
        raise ValueError(
            f"no such command: {command[0]!r}" if command else "give a command: mindjax launch --processes 2 -- COMMAND"
        )
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": _with_devices(environment.get("XLA_FLAGS", ""), devices),
        "PYTHONUNBUFFERED": "1",
        # Collectives block threads of XLA's pool, as many as there are cores: two devices in two of them, in different
        # order, would wait for each other for ever.
        "PJRT_NPROC": environment.get("PJRT_NPROC", str(max(32, 4 * devices))),
        processes.COORDINATOR: f"127.0.0.1:{_free_port()}",
        processes.PROCESSES: str(count),
        processes.HEARTBEAT_TIMEOUT: str(timeout),
        watchdog.STEP_TIMEOUT: str(step_timeout),
    }
    workers: list[Worker] = []
    with _forwarded(workers) as interrupted:
        try:
            for number in range(count):
                workers.append(Worker(number, command, {**environment, processes.PROCESS_ID: str(number)}))
            failed = _wait(workers)
            if failed is None:
                return 0
            # After a signal all end by themselves, but for one that hangs.
            _end_others(workers, failed, timeout if interrupted else GRACE_SECONDS)
        finally:
            for worker in workers:
                worker.signal(signal.SIGKILL)  # and whatever a process that ended has left behind
                worker.process.wait()
                worker.drain()
    if not interrupted:
        print(_explain(workers, failed, timeout), file=sys.stderr)
    return _status(failed)


def _wait(workers: Sequence[Worker]) -> Worker | None:
    """Until one has failed, or all are done: None."""
    while True:
        codes = [worker.process.poll() for worker in workers]
        failed = [worker for worker, code in zip(workers, codes, strict=True) if code]
        if failed:
            return min(failed, key=_follows_another)
        if None not in codes:
            return None
        time.sleep(POLL_SECONDS)


def _follows_another(worker: Worker) -> bool:
    """Whether a process that failed did so because another one had."""
    worker.drain()
    # Of jax: a heartbeat that stays away aborts, and a collective raises.
    lost = any("Gloo" in line and "failed" in line for line in list(worker.last)[-3:])
    return lost or worker.process.returncode == -signal.SIGABRT


def _end_others(workers: Sequence[Worker], failed: Worker, seconds: float) -> None:
    """Notes who is stopped, waits, and kills."""
    until = time.monotonic() + seconds
    others = [worker for worker in workers if worker is not failed]
    for worker in others:
        if worker.process.poll() is None and worker.stopped():
            worker.last.append("(this process was stopped by a signal and did not go on)")
            worker.signal(signal.SIGKILL)
    while time.monotonic() < until and any(worker.process.poll() is None for worker in others):
        time.sleep(POLL_SECONDS)
    for worker in others:
        if worker.process.poll() is None:
            worker.signal(signal.SIGKILL)


def _explain(workers: Sequence[Worker], failed: Worker, timeout: int) -> str:
    lines = [f"mindjax launch: process {failed.number} of {len(workers)} ended with {_name(failed)}"]
    stuck = [worker for worker in workers if worker.last and worker.last[-1].startswith("(this process was stopped")]
    if stuck:
        lines[0] += f", for process {', '.join(str(w.number) for w in stuck)} was not heard of for {timeout} s"
    for worker in dict.fromkeys([*stuck, failed]):
        lines.append(f"the last lines of process {worker.number}:")
        lines += [f"  {line}" for line in worker.last]
    lines.append("the others were ended; a run with checkpoints goes on with the same command")
    return "\n".join(lines)


def _name(worker: Worker) -> str:
    code = worker.process.returncode
    return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _status(worker: Worker) -> int:
    code = worker.process.returncode
    return code if code >= 0 else 128 - code


@contextmanager
def _forwarded(workers: Sequence[Worker]) -> Iterator[list[int]]:
    """Passes signals to end on to all processes, from the third on as SIGKILL; gives the list of those that came."""
    came: list[int] = []

    def forward(number: int, frame: Any) -> None:
        came.append(number)
        for worker in workers:
            worker.signal(number if len(came) < 3 else signal.SIGKILL)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _with_devices(flags: str, devices: int) -> str:
    flag = "--xla_force_host_platform_device_count"
    others = [other for other in flags.split() if not other.startswith(flag)]
    return " ".join([*others, f"{flag}={devices}"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
