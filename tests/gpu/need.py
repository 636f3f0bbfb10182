"""What a GPU test does where it cannot run."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def unavailable(reason: str) -> NoReturn:
    """Skips, or, in `python -m kernels_cuda.gpu`, where a skipped test would pass for a proof, fails."""
    if os.environ.get("MINDJAX_REQUIRE_GPU"):
        pytest.fail(reason)
    pytest.skip(reason)


def need_jax_gpu() -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        unavailable("JAX sees no GPU: set JAX_PLATFORMS=cuda")
