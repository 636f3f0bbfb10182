"""Compiles the real training step for devices that are not there, in a process of its own.

libtpu compiles for any slice that it knows without a TPU. The step is lowered from shapes and shardings alone, so that
no array is ever made: a model of 235 billion parameters needs no more memory here than a small one.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from mindjax.plan.cost import Job
from mindjax.plan.hardware import Topology

ROOT = Path(__file__).resolve().parents[2]
# What a training job on TPU should set in LIBTPU_INIT_ARGS: weights travel while other products run. And sums of
# gradients stay in the loop over micro-batches: moved behind it, the whole embedding and head are kept in float32 on
# every device where fsdp is all of them, or libtpu 0.0.42 fails with an internal error.
OPTIONS = {
    "xla_disable_hlo_passes": "while-loop-all-reduce-code-motion",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says.

    Attributes:
      text: the optimised program; "" where it does not fit.
      memory: kind -> bytes on a device.
      total: bytes on a device at the largest moment.
      seconds: of tracing and compiling.
      mesh: [*sizes of the axes, dimensions] coordinates of the devices.
      flops: the compiler's own count, bodies of loops once.
      problem: why it does not fit, or "".
    """

    text: str
    memory: dict[str, float]
    total: float
    seconds: float
    mesh: np.ndarray
    flops: float
    problem: str


def find_libtpu() -> Path | None:
    """The folder to add to the path for libtpu: beside the environment, or "" where it is installed in it."""
    beside = Path(sys.prefix) / "libtpu"
    if beside.is_dir():
        return beside
    return Path() if importlib.util.find_spec("libtpu") else None


def environment_for(topology: Topology) -> dict[str, str]:
    """The environment of a process that compiles for these devices.

    Raises:
      ValueError: there is no compiler for them.
    """
    environment, kind = dict(os.environ), topology.chip.kind
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    if kind == "tpu":
        folder = find_libtpu()
        if folder is None:
            raise ValueError(
                "there is no TPU compiler here: pip install 'mindjax[plan]' brings libtpu, which needs no TPU; "
                "--no-compile plans by the cost model alone"
            )
        # No queries of a cloud's metadata server; several compilers beside each other hold no device.
        environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        paths.append(str(folder) if folder.parts else "")
    elif kind == "cpu":
        count = f"--xla_force_host_platform_device_count={topology.devices}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {count}"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def compile_step(
    job: Job, topology: Topology, *, options: dict[str, str] | None = None, report: Callable[[str], None] | None = None
) -> Compiled:
    """Compiles one step of supervised fine-tuning, AdamW in float32 around a model in bfloat16.

    Args:
      job: the step.
      topology: the devices. TPUs need libtpu; "cpu:N" makes N virtual devices; GPUs have to be there.
      options: of the compiler; default: `OPTIONS` on TPU.
      report: takes a line of progress every few seconds.

    Raises:
      ValueError: the layout does not fit the job or the number of devices, or there is no compiler.
      RuntimeError: the compiler fails for another reason than memory.
    """
    if job.layout.devices != topology.devices:
        raise ValueError(
            f"layout {job.layout} takes {job.layout.devices} devices and {topology.name} has {topology.devices}"
        )
    environment, kind = environment_for(topology), topology.chip.kind
    if options is None:
        options = OPTIONS if kind == "tpu" else {}
    with tempfile.TemporaryDirectory() as folder_name:
        out, started = Path(folder_name), time.monotonic()
        with open(out / "log.txt", "w") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "mindjax.plan.compile", str(out)],
                env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                assert child.stdin is not None
                child.stdin.write(pickle.dumps((job, topology.name, options)))
                child.stdin.close()
                while True:
                    try:
                        child.wait(5)
                        break
                    except subprocess.TimeoutExpired:
                        if report:
                            stage = (out / "stage.txt").read_text() if (out / "stage.txt").exists() else "starting"
                            report(f"{stage}, {time.monotonic() - started:.0f} s")
            finally:
                child.kill()  # of no effect on one that has ended
                child.wait()
        if not (out / "result.json").exists():
            end = (out / "log.txt").read_text()[-3000:]
            if "ValueError: " in end:
                raise ValueError(end.rpartition("ValueError: ")[2].strip())
            raise RuntimeError(f"compiling {job.layout} for {topology.name} failed:\n{end}")
        result = json.loads((out / "result.json").read_text())
        text = (out / "program.txt").read_text() if (out / "program.txt").exists() else ""
    return Compiled(text=text, mesh=np.asarray(result.pop("mesh")), **result)


# ---- in the other process


def devices_of(topology: Topology, sizes: tuple[int, ...]) -> tuple[list[Any], np.ndarray]:
    """Devices in the order of a mesh of these sizes, and their coordinates [*sizes, dimensions]."""
    import jax
    from jax.experimental import mesh_utils, topologies

    if topology.chip.kind != "tpu":
        devices = jax.devices()[: topology.devices]
        if len(devices) < topology.devices:
            raise ValueError(
                f"{topology.name} takes {topology.devices} devices, here are {len(devices)}; use --no-compile"
            )
        numbers = np.arange(topology.devices)
        return devices, np.stack(np.unravel_index(numbers, topology.shape), -1).reshape(*sizes, -1)
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    mesh = mesh_utils.create_device_mesh(sizes, described.devices, allow_split_physical_axes=True)
    coordinates = np.asarray([device.coords[: topology.chip.torus] for device in mesh.flat])
    return list(mesh.flat), coordinates.reshape(*sizes, -1)


def batch_shapes(job: Job, mesh: Any) -> Any:
    """A batch of the job as shapes with shardings: leaves have a leading axis of micro-batches."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from mindjax.types import Batch, VisionInputs
    from sharding.layout import BATCH

    micro, rows = job.micro_batches, job.batch // job.micro_batches
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, BATCH))

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((micro, *shape), dtype, sharding=sharding)

    vision = None
    if job.images:
        lead = (rows * job.images, job.image_tokens * job.model.vision.merge_unit)
        patches = array((*lead, job.model.vision.patch_dim), jnp.float32)
        vision = VisionInputs(patches, array((*lead, 4)), array(lead))
    row = (rows, job.length)
    return Batch(array(row), array((*row, 3)), array(row), array(row, jnp.float32), array(row), vision)


def lower_step(job: Job, devices: list[Any]) -> tuple[Any, dict[str, float]]:
    """The lowered step, and kind -> bytes of its arguments on a device."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from mindjax.models import qwen3_vl
    from mindjax.sft.train import SFTLoss
    from mindjax.train.optimizer import OptimizerConfig
    from mindjax.train.state import TrainState
    from mindjax.train.step import train_step
    from sharding.parallel import Parallel

    parallel = Parallel.of(job.layout, devices)
    if parallel is None:
        alone = NamedSharding(job.layout.mesh(devices), PartitionSpec())
        shardings = jax.tree.map(lambda _: alone, qwen3_vl.abstract_params(job.model))
        batch = jax.tree.map(lambda leaf: leaf.update(sharding=alone), batch_shapes(job, None))
    else:
        shardings, batch = qwen3_vl.shardings(job.model, parallel), batch_shapes(job, parallel.mesh)
    state = TrainState.abstract(qwen3_vl.abstract_params(job.model), OptimizerConfig(), shardings)
    step = train_step(SFTLoss(job.model, "token", job.remat, parallel), OptimizerConfig(), "bfloat16")
    platform = devices[0].platform
    # Some operations ask for the platform of this process, which is not that of the devices compiled for.
    with mock.patch.object(jax, "default_backend", lambda: platform):
        lowered = step.lower(state, batch)
    kinds = {"parameters": state.params, "optimizer": state.opt_state, "batch": batch}
    return lowered, {kind: sum(map(_local_bytes, jax.tree.leaves(tree))) for kind, tree in kinds.items()}


def _local_bytes(leaf: Any) -> float:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    return float(math.prod(shape) * leaf.dtype.itemsize)


def _child(out: Path) -> None:
    import jax

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    job, name, options = pickle.load(sys.stdin.buffer)
    started = time.monotonic()
    stage = out / "stage.txt"
    stage.write_text("tracing")
    topology = Topology.parse(name)
    devices, mesh = devices_of(topology, tuple(job.layout.sizes.values()))
    lowered, arguments = lower_step(job, devices)
    stage.write_text("compiling")
    problem, text, flops, memory = "", "", 0.0, dict(arguments)
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        found = re.search(
            r"([\d.]+)([KMG]) exceeds available HBM|\(([\d.]+)([KMG])\) exceeds available HBM", str(error)
        )
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        number, unit = [part for part in (found.groups() if found else ()) if part] or ("0", "G")
        problem = str(error).partition("\n")[0][:400]
        memory["temporaries"] = float(number) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit]
    else:
        stats = compiled.memory_analysis()
        memory["results"] = float(stats.output_size_in_bytes - stats.alias_size_in_bytes)
        memory["program"] = float(stats.generated_code_size_in_bytes)
        # What XLA pads arguments by, and the rest of them.
        memory["other arguments"] = float(stats.argument_size_in_bytes) - sum(arguments.values())
        # At the largest moment; `temp_size_in_bytes` is the space they take in turn, with gaps.
        peak = float(stats.peak_memory_in_bytes or stats.temp_size_in_bytes + sum(memory.values()))
        memory["temporaries"] = max(0.0, peak - sum(memory.values()))
        text = compiled.as_text()
        flops = float((compiled.cost_analysis() or {}).get("flops", 0.0))
        (out / "program.txt").write_text(text)
    result = {
        "memory": memory, "total": sum(memory.values()), "seconds": time.monotonic() - started,
        "mesh": mesh.tolist(), "flops": flops, "problem": problem,
    }  # fmt: skip
    (out / "result.draft").write_text(json.dumps(result))
    os.replace(out / "result.draft", out / "result.json")


def _end_with(parent: int) -> None:
    """A compiler that nobody waits for would keep its cores for minutes."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
