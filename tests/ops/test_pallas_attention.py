"""The TPU's attention kernel, interpreted, against the definition; a TPU program is compiled in tests/plan."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.ops import attention as ours
from mindjax.ops import pallas_attention


@pytest.mark.parametrize(("causal", "width"), [(True, 128), (False, 72)])
def test_the_kernel_is_attention(causal: bool, width: int) -> None:
    rng = np.random.default_rng(0)
    rows, length, heads, kv_heads = 1, 256, 4, 2
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((rows, length, n, width)), jnp.bfloat16)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    segments = np.repeat(np.int32([1, 2, 3, 0]), [50, 100, 90, 16])[None]
    real = jnp.asarray(segments > 0)[..., None, None]

    def kernel(q: Any, k: Any, v: Any) -> jax.Array:
        return pallas_attention.attention(q, k, v, segments, segments, causal=causal, interpret=True)

    def definition(q: Any, k: Any, v: Any) -> jax.Array:
        return ours.attention(q, k, v, q_segment_ids=segments, kv_segment_ids=segments, causal=causal)

    def both(function: Any, dtype: Any) -> tuple[Any, ...]:
        """Output and gradients, where rows are real."""
        operands = tuple(x.astype(dtype) for x in (q, k, v))
        out, pull = jax.vjp(lambda *x: jnp.where(real, function(*x), 0), *operands)
        return (out, *pull(g.astype(dtype)))

    # bfloat16 against float32 operands of the same values: what rounding costs, for both. The kernel rounds once more,
    # the scaled queries.
    wanted, rounded = both(definition, jnp.float32), both(definition, jnp.bfloat16)
    for found, exact, theirs in zip(both(kernel, jnp.bfloat16), wanted, rounded, strict=True):
        assert found.dtype == jnp.bfloat16
        assert _distance(found, exact) < 3 * _distance(theirs, exact)
        assert _distance(theirs, exact) > 1e-4


def test_what_it_takes() -> None:
    q = jnp.zeros((1, 256, 4, 64), jnp.bfloat16)
    assert pallas_attention.fits(q, q)
    assert not pallas_attention.fits(q.astype(jnp.float32), q)
    assert not pallas_attention.fits(q[:, :200], q[:, :200])


def _distance(a: jax.Array, b: jax.Array) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
