"""The dense product: accumulation, dtypes and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.ops.matmul import linear, matmul, matmul_transposed, sum_rows


@pytest.mark.parametrize("lead", [(6,), (5,), (2, 3), (1, 4), (1, 1), (2, 3, 2)])
def test_matches_float64(lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, w, g = rng.normal(size=(*lead, 7)), rng.normal(size=(7, 9)), rng.normal(size=(*lead, 9))
    out, vjp = jax.vjp(matmul, jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    dx, dw = vjp(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(out, x @ w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, x.reshape(-1, 7).T @ g.reshape(-1, 9), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_transposed_matches_float64(lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, w, g = rng.normal(size=(*lead, 7)), rng.normal(size=(9, 7)), rng.normal(size=(*lead, 9))
    run = jax.jit(lambda x, w, g: (lambda out, vjp: (out, *vjp(g)))(*jax.vjp(matmul_transposed, x, w)))
    out, dx, dw = run(*(jnp.asarray(a, jnp.float32) for a in (x, w, g)))
    np.testing.assert_allclose(out, x @ w.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, g @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, g.reshape(-1, 9).T @ x.reshape(-1, 7), rtol=1e-5, atol=1e-5)
    half = matmul_transposed(jnp.ones((8, 257), jnp.bfloat16), jnp.ones((8, 257), jnp.bfloat16), dtype=jnp.float32)
    assert half.dtype == jnp.float32 and float(half[0, 0]) == 257  # 257 is not a bfloat16


def test_bfloat16_accumulates_in_float32_in_all_three_products() -> None:
    """Sums of 2048 ones: an accumulator of bfloat16 stops at 256."""
    ones = lambda *shape: jnp.ones(shape, jnp.bfloat16)  # noqa: E731
    run = jax.jit(lambda x, w, g: (lambda out, vjp: (out, *vjp(g)))(*jax.vjp(matmul, x, w)))
    out, _, _ = run(ones(8, 2048), ones(2048, 8), ones(8, 8))
    _, dx, _ = run(ones(8, 8), ones(8, 2048), ones(8, 2048))
    _, _, dw = run(ones(2048, 8), ones(8, 8), ones(2048, 8))
    for product in (out, dx, dw):
        assert product.dtype == jnp.bfloat16
        assert (np.asarray(product, np.float32) == 2048).all()


def test_float32_result_of_bfloat16_is_not_rounded() -> None:
    out = matmul(jnp.ones((8, 257), jnp.bfloat16), jnp.ones((257, 8), jnp.bfloat16), dtype=jnp.float32)
    assert out.dtype == jnp.float32 and float(out[0, 0]) == 257  # 257 is not a bfloat16


@pytest.mark.parametrize("lead", [(6,), (50, 3), (1, 1)])
@pytest.mark.parametrize("columns", [1, 17, 70])
def test_linear_matches_float64(lead: tuple[int, ...], columns: int) -> None:
    rng = np.random.default_rng(0)
    x, w, bias, g = (rng.normal(size=shape) for shape in ((*lead, 7), (7, columns), (columns,), (*lead, columns)))
    run = jax.jit(lambda x, w, bias, g: (lambda out, vjp: (out, *vjp(g)))(*jax.vjp(linear, x, w, bias)))
    expected = (x @ w + bias, g @ w.T, x.reshape(-1, 7).T @ g.reshape(-1, columns), g.reshape(-1, columns).sum(0))
    for array, truth in zip(run(*(jnp.asarray(a, jnp.float32) for a in (x, w, bias, g))), expected, strict=True):
        assert array.dtype == jnp.float32
        np.testing.assert_allclose(array, truth, rtol=1e-5, atol=1e-5)


def test_a_bias_joins_the_sum_before_it_is_rounded() -> None:
    x, w, bias = jnp.asarray([[1, 2**-9]]), jnp.ones((2, 40)), jnp.full(40, 1.5 * 2**-9)
    out = linear(*(a.astype(jnp.bfloat16) for a in (x, w, bias)))
    assert out.dtype == jnp.bfloat16
    assert (np.asarray(out, np.float32) == 1 + 2**-7).all()  # the product alone is rounded to 1, and with its bias so


def test_sums_of_rows_are_float32() -> None:
    assert sum_rows(jnp.ones((4096, 2), jnp.bfloat16)).tolist() == [4096, 4096]
