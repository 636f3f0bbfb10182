"""CUDA C++ kernels, their build and their bindings; imports jax or torch and numpy alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any


def status() -> dict[str, Any]:
    """What this machine could build and run: `nvcc` (path or None), `gpus` (names), `sources`, `built`, `message`."""
    folder = Path(__file__).parent
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    gpus = _gpus()
    sources = sorted(path.name for path in folder.rglob("*.cu"))
    built = sorted(path.name for path in folder.rglob("*.so"))
    if not sources:
        message = "no kernels in this version; the paths in jnp are used"
    elif not gpus:
        message = "no NVIDIA GPU here; the paths in jnp are used"
    elif built:
        message = f"{len(built)} built"
    else:
        message = "not built" if nvcc else "not built, and no nvcc: install the CUDA toolkit or set CUDA_HOME"
    return {"nvcc": nvcc, "gpus": gpus, "sources": sources, "built": built, "message": message}


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver shows."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.splitlines() if line.strip()]
