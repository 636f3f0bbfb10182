"""A matrix read out of its stack gives what the same matrix alone gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_cuda import jax_fused, library
from mindjax.ops.grouped_matmul import grouped_matmul
from mindjax.ops.layer import Layer, in_place
from mindjax.ops.matmul import matmul
from mindjax.ops.quantize import Quantized, quantize, quantized_matmul

LAYERS, EXPERTS = 3, 4


@pytest.fixture(params=["kernels", "jnp"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "jnp":
        monkeypatch.setattr(jax_fused, "usable", lambda: False)
    else:
        assert jax_fused.usable(), library.load("cpu").problem


def normal(*shape: int, dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("out", [None, jnp.float32])
def test_product(dtype: Any, out: Any) -> None:
    stack, x = normal(LAYERS, 48, 80, dtype=dtype), normal(2, 5, 48, dtype=dtype)
    of_layer = jax.jit(lambda x, stack, number: matmul(x, Layer(stack, number), dtype=out))
    for number in range(LAYERS):
        np.testing.assert_array_equal(of_layer(x, stack, jnp.int32(number)), matmul(x, stack[number], dtype=out))


@pytest.mark.parametrize("rows", [2, 40, 70])  # one and several tiles of a kernel for few rows, and too many for it
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_product(rows: int, dtype: Any) -> None:
    """The same bits as the definition gives, wherever the matrix lies."""
    stack = quantize(normal(LAYERS, 80, 192, dtype=jnp.float32), "int8_row")
    x = normal(rows, 192, dtype=dtype)
    of_layer = jax.jit(lambda x, stack, number: matmul(x, Layer(stack, number)))
    for number in range(LAYERS):
        alone = Quantized(stack.values[number], stack.scales[number], stack.format)
        expected = quantized_matmul(quantize(x, "int8_row"), alone, dtype=dtype)
        np.testing.assert_array_equal(of_layer(x, stack, jnp.int32(number)), expected)
        np.testing.assert_array_equal(matmul(x, alone), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_grouped_product(dtype: Any) -> None:
    stack, x = normal(LAYERS, EXPERTS, 48, 80, dtype=dtype), normal(12, 48, dtype=dtype)
    sizes = jnp.asarray([3, 0, 5, 2], jnp.int32)  # two rows belong to nobody
    of_layer = jax.jit(lambda x, stack, number: grouped_matmul(x, Layer(stack, number), sizes))
    for number in range(LAYERS):
        found = of_layer(x, stack, jnp.int32(number))
        np.testing.assert_array_equal(found, grouped_matmul(x, stack[number], sizes))
        assert not found[10:].any()


def test_what_is_sliced() -> None:
    """Norms, and matrices of 8 bits whose products take slices: of float8, and of experts."""
    matrix, norm = normal(LAYERS, 8, 16, dtype=jnp.float32), normal(LAYERS, 8, dtype=jnp.float32)
    int8 = quantize(normal(LAYERS, 16, 32, dtype=jnp.float32), "int8_row")
    float8 = quantize(normal(LAYERS, 16, 32, dtype=jnp.float32), "e4m3_128x128")
    experts = quantize(normal(LAYERS, 2, 16, 32, dtype=jnp.float32), "int8_row")
    sliced, whole = in_place({"a": matrix, "b": norm, "c": int8, "d": float8, "e": experts})
    assert len(jax.tree.leaves(sliced)) == 5  # the norm, values and scales of two
    layer = whole(jax.tree.map(lambda stack: stack[1], sliced), jnp.int32(1))
    assert isinstance(layer["d"], Quantized) and layer["d"].values.shape == (16, 32)
    assert isinstance(layer["e"], Quantized) and layer["e"].values.shape == (2, 16, 32)
    np.testing.assert_array_equal(layer["c"].slice().values, int8.values[1])
    np.testing.assert_array_equal(layer["c"].slice().scales, int8.scales[1])
    np.testing.assert_array_equal(layer["a"].slice(), matrix[1])
    np.testing.assert_array_equal(layer["b"], norm[1])
