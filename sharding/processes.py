"""Many processes, one program: how the processes of a job find each other, and how they end together."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Value = TypeVar("Value")

# What `mindjax launch`, the job files in experiments/cluster and anyone's own launcher set.
COORDINATOR, PROCESSES, PROCESS_ID = "MINDJAX_COORDINATOR", "MINDJAX_PROCESSES", "MINDJAX_PROCESS_ID"
START_TIMEOUT, HEARTBEAT_TIMEOUT = "MINDJAX_START_TIMEOUT", "MINDJAX_HEARTBEAT_TIMEOUT"


@dataclass(frozen=True)
class Timeouts:
    """In seconds.

    Attributes:
      start: until every process has arrived.
      heartbeat: a process that has not been heard of for so long counts as dead, and all others end.
      shutdown: for which a process that is done waits for the others, for the first one may still write a model.
    """

    start: int = 300
    heartbeat: int = 60
    shutdown: int = 1800

    def __post_init__(self) -> None:
        if min(self.start, self.heartbeat, self.shutdown) < 1:
            raise ValueError(f"timeouts are whole seconds, 1 or more, not {self}")

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Timeouts:
        """With what `MINDJAX_START_TIMEOUT` and `MINDJAX_HEARTBEAT_TIMEOUT` say."""
        return cls(
            start=whole_number(START_TIMEOUT, environment, cls.start),
            heartbeat=whole_number(HEARTBEAT_TIMEOUT, environment, cls.heartbeat),
        )


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeouts: Timeouts | None = None,
) -> bool:
    """Joins this process to its job, if it is one of several; a second call does nothing.

    Call it before anything touches a device. What is None here is looked for in `MINDJAX_COORDINATOR`,
    `MINDJAX_PROCESSES` and `MINDJAX_PROCESS_ID`; where none of the three is anywhere, the job is what `find_cluster`
    finds. From then on an uncaught exception ends this process at once: jax would wait for the others first, and they
    wait for this one.

    Args:
      coordinator: "host:port" of process 0, which listens there.
      processes: how many there are.
      process_id: which one this is, from 0.
      timeouts: None is `Timeouts.of(os.environ)`. The process ends with a message, status 1, when `start` has passed:
        jax would abort without one.

    Returns:
      Whether the job has several processes.

    Raises:
      ValueError: some of the three are given and others not, or they do not fit together.
      RuntimeError: process 0 cannot listen at its address, or a device has been touched already.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    options = explicit(coordinator, processes, process_id, os.environ) or find_cluster(os.environ)
    if options is None or options.get("num_processes") == 1:
        return False
    limits = timeouts or Timeouts.of(os.environ)
    if options.get("process_id") == 0:
        _check_port(options["coordinator_address"])
    # Without it, processes on CPUs could not exchange anything; other backends do not look at it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    with _deadline(limits.start, _not_found(options, limits)):
        jax.distributed.initialize(
            **options,
            initialization_timeout=limits.start + 60,  # never before the deadline
            heartbeat_timeout_seconds=limits.heartbeat,
            shutdown_timeout_seconds=limits.shutdown,
        )
    sys.excepthook = _end_at_once
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process prints and writes for the job; touches no device where there is one process."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def from_first(make: Callable[[], Value]) -> Value:
    """What `make` gives in the first process, in all of them; it must fit JSON. All processes call it together."""
    if jax.process_count() == 1:
        return make()
    text = json.dumps(make()).encode() if is_first() else b""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    # Powers of two, so that few lengths are compiled.
    padded = np.zeros(1 << max(10, length.bit_length()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)[:length]))


def leave(status: int) -> int:
    """Call it with the exit status of a failed process: it returns it, and as one of several it ends the process here.

    Leaving in the usual way, a process waits in jax until all others are done, which they never are without it.
    """
    if status and jax.distributed.is_initialized():
        _end(status)
    return status


def explicit(
    coordinator: str | None, processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """What was given in words, as arguments of `jax.distributed.initialize`; None where nothing was.

    Raises:
      ValueError: see `start`.
    """
    found: dict[str, Any] = {
        COORDINATOR: coordinator or environment.get(COORDINATOR) or None,
        PROCESSES: whole_number(PROCESSES, environment, None) if processes is None else processes,
        PROCESS_ID: whole_number(PROCESS_ID, environment, None) if process_id is None else process_id,
    }
    missing = [name for name, value in found.items() if value is None]
    if len(missing) == len(found):
        return None
    if missing:
        given = ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
        raise ValueError(
            f"{given} without {' and '.join(missing)}: a job of several processes needs all three, in every process "
            "(host:port of process 0, how many there are, and which one this is); set the missing, or unset the rest"
        )
    address, count, index = found.values()
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{COORDINATOR} must be host:port, as in 10.0.0.1:8476, not {address!r}")
    if not 0 <= index < count:
        raise ValueError(f"{PROCESS_ID} is {index}; with {PROCESSES}={count} it must be from 0 to {count - 1}")
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        # jax listens on every address of the machine otherwise.
        "coordinator_bind_address": address if _is_loopback(host) else None,
        # All local devices are this process's; jax would go by a Slurm or MPI job around it.
        "cluster_detection_method": "deactivate",
    }


def find_cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The job that a scheduler started this process in, as arguments of `jax.distributed.initialize`; None: no such.

    jax's own detection does the work; what is decided here is whether to ask it, for outside of a job it raises, and
    a shell on a cluster's node is no job. Known: Slurm steps (`srun`), Open MPI, indexed Jobs and JobSets of
    Kubernetes (with the `kubernetes` package and leave to read pods), TPU slices on GKE.
    """
    if "SLURM_STEP_NODELIST" in environment and whole_number("SLURM_NTASKS", environment, 1) > 1:
        return {"cluster_detection_method": "slurm", "local_device_ids": _slurm_devices(environment)}
    if "OMPI_MCA_orte_hnp_uri" in environment and whole_number("OMPI_COMM_WORLD_SIZE", environment, 1) > 1:
        return {"cluster_detection_method": "ompi"}
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return {}
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return {}
    return None


def whole_number(name: str, environment: Mapping[str, str], default: Any) -> Any:
    """An environment variable as an int; `default` where it is not set or empty.

    Raises:
      ValueError: it is something else.
    """
    text = environment.get(name)
    if not text:
        return default
    if not text.isdigit():
        raise ValueError(f"{name} must be a whole number, not {text!r}")
    return int(text)


def _slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """The devices of this task; None leaves them to jax, which gives the n-th task of a node the n-th device.

    That leaves all but the first device idle where a node runs one task, and names a device that is not there where
    Slurm shows each task its own device alone.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    devices = len(visible.split(",")) if visible else whole_number("SLURM_GPUS_ON_NODE", environment, 0)
    one_task = environment.get("SLURM_NTASKS") == environment.get("SLURM_STEP_NUM_NODES")
    return list(range(devices)) if devices == 1 or (devices and one_task) else None


def _not_found(options: Mapping[str, Any], limits: Timeouts) -> str:
    where = options.get("coordinator_address", "the address that the scheduler gives")
    if options.get("process_id") == 0:
        what = (
            f"process 0 waited {limits.start} s at {where} and not all {options['num_processes']} processes came. See "
            "whether each was started, and can reach that address"
        )
    else:
        what = (
            f"no answer from {where} within {limits.start} s. Process 0 listens there, until all are there: see "
            "whether it runs, whether the address is its own and open to other machines, whether a proxy variable is "
            "in the way, and whether every process was started"
        )
    return f"{what}. {START_TIMEOUT} sets how many seconds to wait."


def _check_port(address: str) -> None:
    """jax crashes where it cannot listen."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that a job has just left is free
        try:
            probe.bind((host if _is_loopback(host) else "", int(port)))
        except OSError as error:
            raise RuntimeError(
                f"process 0 cannot listen at {address} ({error.strerror}): another job may use the port; give another"
            ) from None


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.")


@contextmanager
def _deadline(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with a message unless the block is left in time."""

    def expire() -> None:
        print(f"mindjax: {message}", file=sys.stderr)
        _end(1)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_at_once(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, where)
    if issubclass(kind, Exception):  # Ctrl-C reaches all processes, and they end together
        _end(1)


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
