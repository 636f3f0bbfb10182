"""How the processes of a job find each other: from words, from a scheduler, and what is said when they do not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from sharding.processes import Timeouts, explicit, find_cluster, is_first, leave
from sharding.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[2]
OURS = {"MINDJAX_COORDINATOR": "10.0.0.1:8476", "MINDJAX_PROCESSES": "4", "MINDJAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}
REPORT = "from sharding import processes; several = processes.start(); import jax; "
REPORT += "print(several, processes.is_first(), jax.process_index(), jax.process_count(), processes.start())"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process(environment: Mapping[str, str], program: str = REPORT) -> subprocess.Popen[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MINDJAX_"))}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**inherited, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_words_win_over_the_environment_and_both_may_be_mixed() -> None:
    found = explicit(None, None, None, OURS)
    assert found is not None
    assert (found["coordinator_address"], found["num_processes"], found["process_id"]) == ("10.0.0.1:8476", 4, 3)
    assert found["coordinator_bind_address"] is None  # of other machines: jax's default, all addresses
    found = explicit("127.0.0.1:99", None, 0, OURS)
    assert found is not None
    assert (found["coordinator_address"], found["num_processes"], found["process_id"]) == ("127.0.0.1:99", 4, 0)
    assert found["coordinator_bind_address"] == "127.0.0.1:99"  # loopback stays loopback
    assert explicit(None, None, None, {}) is None
    assert explicit(None, None, None, dict.fromkeys(OURS, "")) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"MINDJAX_PROCESS_ID": ""}, "without MINDJAX_PROCESS_ID: .* needs all three"),
        ({"MINDJAX_COORDINATOR": "", "MINDJAX_PROCESSES": ""}, "without MINDJAX_COORDINATOR and MINDJAX_PROCESSES"),
        ({"MINDJAX_PROCESS_ID": "4"}, "MINDJAX_PROCESS_ID is 4; with MINDJAX_PROCESSES=4 it must be from 0 to 3"),
        ({"MINDJAX_PROCESSES": "four"}, "MINDJAX_PROCESSES must be a whole number, not 'four'"),
        ({"MINDJAX_COORDINATOR": "10.0.0.1"}, "must be host:port"),
        ({"MINDJAX_COORDINATOR": ":8476"}, "must be host:port"),
        ({"MINDJAX_COORDINATOR": "host:99999"}, "must be host:port"),
    ],
)
def test_half_a_setting_is_an_error_that_names_the_rest(changed: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explicit(None, None, None, {**OURS, **changed})


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),  # one task: no job of several
        ({key: SLURM[key] for key in ("SLURM_JOB_ID", "SLURM_NTASKS")}, None),  # the batch script itself, no step
        (SLURM, {"cluster_detection_method": "slurm", "local_device_ids": None}),
        # One task on each of two nodes has all GPUs of its node; jax would give it one.
        (
            {**SLURM, "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"},
            {"cluster_detection_method": "slurm", "local_device_ids": [0, 1, 2, 3]},
        ),
        # Two tasks on one node: each the one that jax gives it, or the only one that Slurm shows it.
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1"}, {"cluster_detection_method": "slurm", "local_device_ids": None}),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "1"}, {"cluster_detection_method": "slurm", "local_device_ids": [0]}),
        (
            {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"},
            {"cluster_detection_method": "ompi"},
        ),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is not of an indexed job
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, {}),
    ],
)
def test_a_job_of_several_is_told_from_a_shell_on_the_same_node(environment: dict[str, str], found: object) -> None:
    assert find_cluster(environment) == found


def test_slurm_tasks_find_each_other_by_themselves() -> None:
    # jax takes the port from the number of the job.
    port = 61440 + free_port() % 4096
    shared = {**SLURM, "SLURM_JOB_ID": str(port - 61440)}
    tasks = [process({**shared, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}) for n in range(2)]
    for number, task in enumerate(tasks):
        out, error = task.communicate(timeout=60)
        assert task.returncode == 0, error
        assert out.splitlines()[-1] == f"True {number == 0} {number} 2 True"


def test_one_process_touches_no_device() -> None:
    program = "from sharding import processes; print(processes.start(), processes.is_first()); "
    program += "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    alone = process({**OURS, "MINDJAX_PROCESSES": "1", "MINDJAX_PROCESS_ID": "0"}, program)
    assert alone.communicate(timeout=60)[0].split() == ["False", "True", "False"]
    assert is_first() and leave(3) == 3  # this process is no job either


@pytest.mark.parametrize(("number", "says"), [(0, "not all 2 processes came"), (1, "Process 0 listens there")])
def test_a_job_that_does_not_come_together_says_so(number: int, says: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    words = {"MINDJAX_COORDINATOR": address, "MINDJAX_PROCESSES": "2", "MINDJAX_PROCESS_ID": str(number)}
    alone = process({**words, "MINDJAX_START_TIMEOUT": "2"})
    _, error = alone.communicate(timeout=60)
    assert alone.returncode == 1
    assert says in error and address in error and "MINDJAX_START_TIMEOUT" in error


def test_a_port_in_use_is_an_error_and_no_crash() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        words = {"MINDJAX_COORDINATOR": address, "MINDJAX_PROCESSES": "2", "MINDJAX_PROCESS_ID": "0"}
        alone = process(words)
        _, error = alone.communicate(timeout=60)
    assert alone.returncode == 1 and f"process 0 cannot listen at {address}" in error


def test_timeouts_come_from_the_environment() -> None:
    assert Timeouts.of({"MINDJAX_HEARTBEAT_TIMEOUT": "7"}) == Timeouts(heartbeat=7)
    assert Timeouts.of({"MINDJAX_START_TIMEOUT": "8"}) == Timeouts(start=8)
    with pytest.raises(ValueError, match="1 or more"):
        Timeouts.of({"MINDJAX_START_TIMEOUT": "0"})


def test_the_watchdog_bites_only_when_a_step_does_not_end() -> None:
    program = (
        "import time; from sharding.watchdog import Watchdog\n"
        "with Watchdog(1) as dog:\n"
        "    time.sleep(1.5); print('compiled', flush=True)\n"  # before the first step nothing is watched
        "    for _ in range(8): dog.beat(); time.sleep(0.2)\n"
        "time.sleep(1.5); print('after', flush=True)\n"  # nor behind the block
        "with Watchdog(1) as dog:\n"
        "    dog.beat(); time.sleep(60)\n"
    )
    hung = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=50)
    assert (hung.returncode, hung.stdout.split()) == (124, ["compiled", "after"])
    assert "no step has finished for 1 s" in hung.stderr and 'File "<string>", line 7' in hung.stderr


def test_the_watchdog_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINDJAX_STEP_TIMEOUT", raising=False)
    assert Watchdog()._seconds == 0
    monkeypatch.setenv("MINDJAX_STEP_TIMEOUT", "90")
    assert Watchdog()._seconds == 90 and Watchdog(5)._seconds == 5
