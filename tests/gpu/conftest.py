"""Tests that need a Hopper GPU; they build the library first. One command for all: `python -m kernels_cuda.gpu`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kernels_cuda import checks, library
from tests.gpu.need import unavailable

WANTED = (9, 0)


def no_hopper() -> str:
    """Why these tests cannot run here, "" where they can."""
    try:
        import torch
    except ImportError:
        return "no torch"
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    if capability != WANTED:
        return f"compute capability {capability}, not {WANTED}"
    return "" if library.nvcc() else "no nvcc"


@pytest.fixture(scope="session", autouse=True)
def built() -> Iterator[None]:
    reason = no_hopper()
    if reason:
        unavailable(reason)
    path, _ = checks.build("cuda")
    os.environ["MINDJAX_KERNELS"] = str(path.parent)
    library.load.cache_clear()
    yield


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch

    torch.manual_seed(0)
