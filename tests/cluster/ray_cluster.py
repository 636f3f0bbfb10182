"""Run by test_cluster_jobs.py with Ray's environment: the Ray job on a cluster of two nodes on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

JOB = [sys.executable, "experiments/cluster/ray_job.py", "--nodes", "2", "--restarts", "1", "--"]


def main(folder: Path) -> None:
    tally = folder / "attempts"
    note = f'[ "$MINDJAX_PROCESS_ID" = 1 ] || echo >> {tally}'
    commands = {
        "computes": [sys.executable, "-m", "tests.launched", "8"],
        "fails once": ["sh", "-c", f"{note}; [ -e {folder}/mark ] || {{ touch {folder}/mark; exit 5; }}"],
        "is a mistake": ["sh", "-c", f"{note}; exit 2"],
        "one of two fails": [sys.executable, "-m", "tests.launched", "1000000000", "raise", "1"],
    }
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    results: dict[str, Any] = {}
    try:
        for name, command in commands.items():
            tally.write_text("")
            environment = {**os.environ, "RAY_ADDRESS": cluster.address, "MINDJAX_HEARTBEAT_TIMEOUT": "10"}
            done = subprocess.run([*JOB, *command], env=environment, capture_output=True, text=True, timeout=120)
            lines = sorted(re.findall(r"several .*\]", done.stdout))
            attempts = len(tally.read_text().splitlines())
            results[name] = {"status": done.returncode, "lines": lines, "attempts": attempts}
    finally:
        cluster.shutdown()
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
