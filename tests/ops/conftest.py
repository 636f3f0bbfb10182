"""What the tests of operations share."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from kernels_cuda import jax_fused, library


@pytest.fixture(params=["kernel", "jnp"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """By which of its two forms an operation runs."""
    if request.param == "jnp":
        monkeypatch.setattr(jax_fused, "usable", lambda: False)
    elif not jax_fused.usable():
        pytest.skip(library.load("cpu").problem)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()
