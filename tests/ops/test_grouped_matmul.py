"""Grouped products against float64, with every awkward grouping."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_cuda.jax_binding
import kernels_cuda.library
from mindjax.ops.grouped_matmul import grouped_matmul, grouped_matmul_reference

K, N = 12, 20
CASES = {
    "mixed": ([3, 0, 5, 1], 9),
    "leading empty": ([0, 0, 4, 2], 6),
    "all empty": ([0, 0, 0], 8),
    "one takes all": ([0, 40, 0], 40),
    "tail": ([5, 2, 3], 17),
    "odd sizes": ([1, 63, 64, 65, 0, 127, 129], 460),
}


def operands(sizes: list[int], rows: int) -> tuple[np.ndarray, ...]:
    """Rows past the last group, and their cotangents, are NaN."""
    rng = np.random.default_rng(0)
    lhs, g = rng.normal(size=(rows, K)), rng.normal(size=(rows, N))
    lhs[sum(sizes) :] = np.nan
    g[sum(sizes) :] = np.nan
    rhs = rng.normal(size=(len(sizes), K, N))
    return tuple(a.astype(np.float32) for a in (lhs, rhs, g))


def expected(lhs: np.ndarray, rhs: np.ndarray, g: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, ...]:
    lhs, rhs, g = (a.astype(np.float64) for a in (lhs, rhs, g))
    out, dlhs, drhs = np.zeros((len(lhs), N)), np.zeros(lhs.shape), np.zeros(rhs.shape)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = lhs[rows] @ rhs[group]
        dlhs[rows] = g[rows] @ rhs[group].T
        drhs[group] = lhs[rows].T @ g[rows]
        start += size
    return out, dlhs, drhs


@pytest.mark.parametrize("implementation", ["auto", "reference", "loop", "ragged_dot"])
@pytest.mark.parametrize("name", CASES)
def test_product_and_gradients(name: str, implementation: str) -> None:
    sizes, rows = CASES[name]
    lhs, rhs, g = operands(sizes, rows)

    @jax.jit
    def run(lhs: jax.Array, rhs: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        group_sizes = jnp.asarray(sizes, jnp.int32)
        out, vjp = jax.vjp(lambda a, b: grouped_matmul(a, b, group_sizes, implementation=implementation), lhs, rhs)
        return out, *vjp(g)

    for ours, reference in zip(run(lhs, rhs, g), expected(lhs, rhs, g, sizes), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=2e-6 * max(1.0, np.abs(reference).max()))


def test_reference_matches_float64() -> None:
    sizes, rows = CASES["tail"]
    lhs, rhs, g = operands(sizes, rows)
    out = grouped_matmul_reference(lhs, rhs, jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(out, expected(lhs, rhs, g, sizes)[0], atol=1e-5)


def test_sizes_are_data_not_shape() -> None:
    run = jax.jit(grouped_matmul)
    lhs, rhs, _ = operands([4, 4], 8)
    for sizes in ([4, 4], [0, 8], [8, 0], [1, 2]):
        out = run(lhs, rhs, jnp.asarray(sizes, jnp.int32))
        used = lhs.copy()
        used[sum(sizes) :] = np.nan
        np.testing.assert_allclose(out, expected(used, rhs, np.zeros((8, N)), sizes)[0], atol=1e-5)
    assert run._cache_size() == 1


def test_bfloat16_accumulates_in_float32() -> None:
    """A sum of 4096 ones times 1 + 2^-8 is lost to an accumulator of bfloat16 beyond 256."""
    rows, k = 4096, 4096
    lhs = jnp.ones((8, k), jnp.bfloat16)
    out = grouped_matmul(lhs, jnp.ones((2, k, 8), jnp.bfloat16), jnp.asarray([4, 4], jnp.int32))
    assert out.dtype == jnp.bfloat16 and float(out[0, 0]) == 4096
    tall = jnp.ones((rows, 8), jnp.bfloat16)
    sizes = jnp.asarray([rows, 0], jnp.int32)
    gradient = jax.grad(lambda w: grouped_matmul(tall, w, sizes).astype(jnp.float32).sum())(
        jnp.zeros((2, 8, 8), jnp.bfloat16)
    )
    assert (np.asarray(gradient[0], np.float32) == rows).all() and not np.any(np.asarray(gradient[1], np.float32))


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"x \[R, K\]"):
        grouped_matmul(jnp.ones((4, 3)), jnp.ones((2, 5, 6)), jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match="implementation must be one of"):
        grouped_matmul(jnp.ones((4, 3)), jnp.ones((2, 3, 6)), jnp.ones(2, jnp.int32), implementation="fast")
    with pytest.raises(ValueError, match="one dtype, float32 or bfloat16, and int32"):
        grouped_matmul(jnp.ones((4, 3)), jnp.ones((2, 3, 6), jnp.bfloat16), jnp.ones(2, jnp.int32))


def test_missing_library_is_an_error_that_says_how_to_build_it() -> None:
    if kernels_cuda.library.load("cuda").handle is None:
        with pytest.raises(ValueError, match="built"):
            grouped_matmul(jnp.ones((4, 3)), jnp.ones((2, 3, 6)), jnp.ones(2, jnp.int32), implementation="cuda")


def test_without_a_library_auto_takes_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_cuda.jax_binding, "available", lambda backend: False)
    sizes, rows = CASES["tail"]
    lhs, rhs, g = operands(sizes, rows)
    program = jax.jit(grouped_matmul).lower(lhs, rhs, jnp.asarray(sizes, jnp.int32))
    assert "mjk_gmm" not in program.as_text() and "while" in program.as_text()
    out = program.compile()(lhs, rhs, jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(out, expected(lhs, rhs, g, sizes)[0], atol=1e-5)
