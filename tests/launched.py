"""Program of test_launch.py: processes that add up numbers over all devices, step by step, and what befalls one.

python -m tests.launched STEPS [EVENT PROCESS]
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.processes import is_first, start
from sharding.watchdog import Watchdog

AT = 5  # the step of the event


def main(steps: int, event: str = "", process: int = -1) -> None:
    several = start()
    asked = threading.Event()
    if event == "wait":
        signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    here = jax.process_index() == process
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    add = jax.jit(lambda x: x + x.sum() % 7, out_shardings=sharding)
    numbers = np.arange(jax.device_count(), dtype=np.float32)
    x = jax.make_array_from_callback(numbers.shape, sharding, lambda index: numbers[index])
    with Watchdog() as watchdog:
        for step in range(steps):
            x = jax.block_until_ready(add(x))
            watchdog.beat()
            if step == AT:
                print(f"step {step} of {jax.process_index()}", flush=True)
            if step == AT and here and event == "raise":
                raise RuntimeError("something broke")
            if step == AT and here and event in ("SIGKILL", "SIGSTOP"):
                os.kill(os.getpid(), getattr(signal, event))
            if step == AT and here and event == "hang":
                threading.Event().wait()
            if step == AT and event == "wait":
                print("waits", flush=True)
                asked.wait()
                print(f"process {jax.process_index()} was asked to end", flush=True)
                sys.exit(0)
    own = [float(shard.data[0]) for shard in x.addressable_shards]
    print(f"several {several} first {is_first()} devices {jax.device_count()} values {own}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:4]))
