"""What every test shares: the CPU as the one JAX device, a compilation cache that outlives the run, strict mode.

Tests see one CPU device. A test of layouts over several devices starts a subprocess with
`XLA_FLAGS=--xla_force_host_platform_device_count=8`, so that the others do not share their threads with idle devices.
Tests marked `gpu` take whatever device JAX finds: run them alone, with `JAX_PLATFORMS=cuda pytest -m gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mindjax.allocator import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
# Before anything imports jax, and inherited by the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers of pytest-xdist share the cores out, so that none waits for a thread that another's work holds up.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[int(worker[2:]) % len(cores) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])])
keep_freed_memory()


@pytest.fixture
def strict() -> Iterator[None]:
    """Ranks and dtypes are never promoted silently; for forward passes and losses (optax itself fails under it)."""
    import jax

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
