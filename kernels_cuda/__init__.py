"""CUDA C++ and CPU kernels, their build and their bindings; imports jax or torch and numpy alone."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from kernels_cuda import library


def status() -> dict[str, Any]:
    """What this machine could build and run.

    Returns:
      `nvcc` (path or None), `gpus` (names), `sources` (of CUDA), `built` (library files), `isa` (what the CPU library
      runs on, None without one), `problems` (backend -> what is missing and how to get it, for those that matter
      here), `message` (one line).
    """
    libraries = {backend: library.load(backend) for backend in library.BACKENDS}
    cpu, gpus = libraries["cpu"].handle, _gpus()
    isa = cpu.mjk_isa().decode() if cpu else None
    problems = {
        backend: found.problem for backend, found in libraries.items() if found.problem and (gpus or backend != "cuda")
    }
    if cpu and not hasattr(cpu, "mjk_ffi_gmm"):
        problems["cpu"] = f"{libraries['cpu'].path} was built without JAX's headers; build it again: {library.BUILD}"
        isa = None
    message = f"CPU: {isa}" if isa else f"CPU: the jnp loop is used; {problems['cpu']}"
    if "cuda" in problems:
        message += f"; CUDA: {problems['cuda']}"
    elif gpus:
        message += f"; CUDA: {libraries['cuda'].path}"
    return {
        "nvcc": library.nvcc(),
        "gpus": gpus,
        "sources": sorted(path.name for path in Path(__file__).parent.rglob("*.cu")),
        "built": [str(found.path) for found in libraries.values() if found.handle],
        "isa": isa,
        "problems": problems,
        "message": message,
    }


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver shows."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.splitlines() if line.strip()]
