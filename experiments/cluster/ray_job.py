"""A Ray job that runs one process per node, and starts all of them again when one fails.

    ray job submit --address http://HEAD:8265 --working-dir . -- \\
        python experiments/cluster/ray_job.py --nodes 4 --gpus-per-node 8 -- \\
        mindjax sft --config=experiments/sft.py --workdir=/shared/runs/sft

The workdir must be on a file system that all nodes share: every start goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

INTERRUPTED = 130  # what mindjax ends with once a signal made it save
MISTAKE = 2  # in the command or the config, which a restart does not mend


@ray.remote(max_concurrency=2)  # `stop` is answered while `run` waits
class Node:
    """One process, on the node where Ray puts this actor."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def address(self) -> str:
        """ "host:port", free now, where the first process may listen."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(self, command: Sequence[str], variables: dict[str, str]) -> int:
        """The exit status of the command; what it prints is in the log of the job."""
        self._process = subprocess.Popen(command, env={**os.environ, **variables})
        return self._process.wait()

    def stop(self) -> None:
        """Ends the command."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)


def attempt(command: Sequence[str], bundle: dict[str, float], nodes: int, wait_s: float) -> int:
    """Runs the command on every node until all are done or one has failed; 0, or the status of that one."""
    group = placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
    try:
        ray.get(group.ready(), timeout=wait_s)
        actors = [
            Node.options(  # type: ignore[attr-defined]
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
            ).remote()
            for number in range(nodes)
        ]
        shared = {"MINDJAX_COORDINATOR": ray.get(actors[0].address.remote()), "MINDJAX_PROCESSES": str(nodes)}
        running = [
            actor.run.remote(list(command), {**shared, "MINDJAX_PROCESS_ID": str(number)})
            for number, actor in enumerate(actors)
        ]
        while running:
            (done,), running = ray.wait(running, num_returns=1)
            try:
                status = ray.get(done)
            except ray.exceptions.RayError as error:  # the node is gone
                print(f"a node was lost: {error}", file=sys.stderr)
                status = 1
            if status:
                for actor in actors:
                    actor.stop.remote()
                return status if status > 0 else 128 - status
        return 0
    finally:
        remove_placement_group(group)  # and with it its actors


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=float, default=0)
    parser.add_argument("--cpus-per-node", type=float, default=1)
    parser.add_argument("--restarts", type=int, default=10, help="after failures")
    parser.add_argument("--wait", type=float, default=1800, help="seconds until so many nodes must be free")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND")
    arguments = parser.parse_args(argv)
    bundle = {"CPU": arguments.cpus_per_node}
    if arguments.gpus_per_node:
        bundle["GPU"] = arguments.gpus_per_node
    status = 0
    ray.init()
    for restart in range(arguments.restarts + 1):
        status = attempt(arguments.command, bundle, arguments.nodes, arguments.wait)
        if status in (0, INTERRUPTED, MISTAKE):
            break
        print(f"ended with status {status}; restart {restart + 1} of {arguments.restarts}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
