"""Quantised bits against NumPy, ml_dtypes and torch; quantised products against integers and float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from kernels_cuda import jax_binding
from mindjax.ops import quantize as ops
from mindjax.ops.quantize import FORMATS, Quantized, dequantize, quantize, quantized_matmul

TINY = np.float32(2.0**-126)
NUMPY_DTYPE = {
    "int8": np.dtype(np.int8),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
LARGEST = {"int8": 127, "e4m3": 448, "e5m2": 57344}
run = jax.jit(quantize, static_argnums=1)


def expected(x: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of one matrix, a block at a time, in NumPy's float32 and ml_dtypes' casts."""
    kind, blocking = format.split("_")
    largest = np.float32(LARGEST[kind])
    rows, columns = {"tensor": x.shape, "row": (1, x.shape[1])}.get(blocking) or map(int, blocking.split("x"))
    x = x.astype(np.float32)
    x = np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)
    values = np.empty(x.shape, NUMPY_DTYPE[kind])
    scales = np.empty((-(-x.shape[0] // rows), -(-x.shape[1] // columns)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            block = x[where]
            if not np.isfinite(block).all():
                values[where], scales[i, j] = 0, np.nan
                continue
            most = np.abs(block).max()
            scales[i, j] = np.maximum(most / largest, TINY) if most else 1
            quotient = np.clip(block / scales[i, j], -largest, largest)
            values[where] = (np.rint(quotient) if kind == "int8" else quotient).astype(values.dtype)
    return values, scales


def assert_same_bits(q: Quantized, values: np.ndarray, scales: np.ndarray) -> None:
    assert q.values.shape == values.shape and q.values.dtype == values.dtype
    np.testing.assert_array_equal(np.asarray(q.values).view(np.uint8), values.view(np.uint8))
    assert q.scales.shape == scales.shape and q.scales.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(q.scales), scales)


@pytest.mark.parametrize("largest", [None, 2.0**-9])
@pytest.mark.parametrize("format", FORMATS)
def test_every_bfloat16(format: str, largest: float | None) -> None:
    """All sizes, zeros, numbers below 2^-126, infinities, NaN; in blocks of neighbours, and below one large number."""
    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(512, 128)
    if largest:
        x = np.where(np.abs(x.astype(np.float32)) <= largest, x, 0).astype(x.dtype)
        x[:, 0] = largest
    assert_same_bits(run(jnp.asarray(x), format), *expected(x, format))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(130, 200), (3, 129)])
def test_float32_over_all_ranges(format: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * np.exp2(rng.integers(-12, 12, shape)) * np.exp2(rng.integers(-110, 110, (shape[0], 1)))
    assert_same_bits(run(x.astype(np.float32), format), *expected(x.astype(np.float32), format))


@pytest.mark.parametrize("format", ["e4m3_row", "e5m2_row"])
def test_ties_go_to_even(format: str) -> None:
    """All values, all midpoints between two, and the float32 numbers on both sides of those; the scale is 1."""
    kind = format.split("_")[0]
    values = np.arange(256, dtype=np.uint8).view(NUMPY_DTYPE[kind]).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    middle = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, middle, np.nextafter(middle, np.float32(1e9)), np.nextafter(middle, np.float32(-1e9))])
    q = run(x[None], format)
    assert float(q.scales[0, 0]) == 1
    assert_same_bits(q, x[None].astype(NUMPY_DTYPE[kind]), np.ones((1, 1), np.float32))


def test_division_is_correctly_rounded() -> None:
    """`/` under jit is not: XLA multiplies by reciprocals, which is off in one of four here."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(4096, 128)) * np.exp2(rng.integers(-30, 30, (4096, 128)))).astype(np.float32)
    y = np.abs(rng.normal(size=(4096, 1)) * np.exp2(rng.integers(-30, 30, (4096, 1)))).astype(np.float32)
    divide = jax.jit(lambda x, y: ops._divide(x, jnp.broadcast_to(y, x.shape)))
    np.testing.assert_array_equal(divide(x, y), x / y)
    assert np.mean(np.asarray(jax.jit(lambda x, y: x / y)(x, y)) != x / y) > 0.1


def test_experts_are_matrices_of_their_own() -> None:
    x = np.random.default_rng(2).normal(size=(3, 130, 140)).astype(np.float32) * np.float32([[[1]], [[100]], [[0]]])
    for format in FORMATS:
        q = run(x, format)
        for i in range(3):
            assert_same_bits(Quantized(q.values[i], q.scales[i], format), *expected(x[i], format))


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize(format: str) -> None:
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(200, 300)) * np.exp2(rng.integers(-6, 6, (200, 300)))).astype(np.float32)
    q = run(x, format)
    back = np.asarray(dequantize(q))
    blocks = [-(-size // count) for size, count in zip(x.shape, q.scales.shape, strict=True)]
    if "128" in format:
        blocks = [int(part) for part in format.split("_")[1].split("x")]
    scales = np.asarray(q.scales).repeat(blocks[0], 0).repeat(blocks[1], 1)[:200, :300]
    np.testing.assert_array_equal(back, np.asarray(q.values).astype(np.float32) * scales)
    # Half a step of the format: relative for floats, of the block's largest for int8 and below the smallest normals.
    step = {"int8": 0.5, "e4m3": 2.0**-10, "e5m2": 2.0**-17}[format.split("_")[0]] * 1.001
    relative = {"int8": 0, "e4m3": 2.0**-4, "e5m2": 2.0**-3}[format.split("_")[0]]
    assert (np.abs(back - x) <= np.maximum(step * scales, relative * np.abs(x))).all()
    assert dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16


def test_a_bad_number_shows_in_its_block_alone() -> None:
    x = np.ones((4, 256), np.float32)
    x[0, 3], x[1, 200], x[2, 0] = np.nan, np.inf, -np.inf
    for format in ("int8_row", "e4m3_1x128"):
        bad = np.isnan(np.asarray(dequantize(run(x, format)))).reshape(4, 2, 128)
        assert (bad.all(-1) == bad.any(-1)).all()
        want = [[1, 0], [0, 1], [1, 0], [0, 0]] if "128" in format else [[1, 1]] * 3 + [[0, 0]]
        np.testing.assert_array_equal(bad.any(-1), np.array(want, bool))


def test_same_bits_as_torch() -> None:
    x = np.random.default_rng(4).normal(size=(256, 512)).astype(np.float32)
    ours = run(x, "e4m3_128x128")
    blocks = torch.from_numpy(x).reshape(2, 128, 4, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    theirs = (blocks / scales[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn).reshape(256, 512)
    assert_same_bits(ours, theirs.view(torch.uint8).numpy().view(NUMPY_DTYPE["e4m3"]), scales.numpy())
    # And what torch makes of ours is what we make of it.
    back = (theirs.float().reshape(2, 128, 4, 128) * scales[:, None, :, None]).reshape(256, 512)
    np.testing.assert_array_equal(dequantize(ours), back.numpy())


# ---- the CPU's kernels


def test_kernel_quantises_to_the_same_bits() -> None:
    rng = np.random.default_rng(8)
    for dtype in (jnp.float32, jnp.bfloat16):
        for shape in ((64, 2048), (33, 300), (1, 1)):
            x = jnp.asarray(rng.normal(size=shape) * np.exp2(rng.integers(-40, 40, shape)), dtype).at[0].set(0)
            x = x.at[1:5].multiply(jnp.asarray([[1e-30], [1e-38], [1e-40], [jnp.nan]], dtype)[: max(shape[0] - 1, 0)])
            values, scales = jax.jit(jax_binding.quantize_e4m3)(x)
            assert_same_bits(run(x, "e4m3_1x128"), np.asarray(values), np.asarray(scales))


def test_kernel_multiplies_alike() -> None:
    """One group of the grouped products: int8 to the last bit, fp8 within the gates against float64."""
    rng = np.random.default_rng(9)
    for rows, outputs, k in ((5, 7, 33), (70, 200, 1100)):
        x, w = (jnp.asarray(rng.normal(size=(n, k)), jnp.float32) for n in (rows, outputs))
        sizes = jnp.asarray([rows], jnp.int32)
        a, b = run(x, "int8_row"), run(w, "int8_row")
        kernel = jax.jit(jax_binding.gmm_s8, static_argnames="dtype")
        out = kernel(a.values, a.scales[:, 0], b.values[None], b.scales[None, :, 0], sizes, dtype=jnp.float32)
        np.testing.assert_array_equal(out, quantized_matmul(a, b))
        a, b = run(x, "e4m3_1x128"), run(w, "e4m3_128x128")
        for dtype, gate in ((jnp.float32, 5e-4), (jnp.bfloat16, 3e-3)):
            kernel = jax.jit(jax_binding.gmm_fp8, static_argnames="dtype")
            out = kernel(a.values, a.scales, b.values[None], b.scales[None], sizes, dtype=dtype)
            assert relative_error(out, float64(a) @ float64(b).T) < gate
            assert relative_error(out, np.asarray(quantized_matmul(a, b), np.float64)) < gate


# ---- products


def test_int8_product_is_exact() -> None:
    rng = np.random.default_rng(5)
    for rows, outputs, k in ((5, 7, 33), (64, 96, 2048)):
        x, w = (run(rng.normal(size=(n, k)).astype(np.float32), "int8_row") for n in (rows, outputs))
        total = np.asarray(x.values, np.int64) @ np.asarray(w.values, np.int64).T
        want = total.astype(np.float32) * (np.asarray(x.scales) * np.asarray(w.scales).T)
        np.testing.assert_array_equal(jax.jit(quantized_matmul)(x, w), want)
    extreme = Quantized(jnp.full((1, 8192), -127, jnp.int8), jnp.ones((1, 1), jnp.float32), "int8_tensor")
    assert float(quantized_matmul(extreme, extreme)[0, 0]) == 127 * 127 * 8192  # beyond 2^24, where float32 has gaps


def relative_error(ours: Any, reference: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(ours, np.float64) - reference) / np.linalg.norm(reference))


def float64(q: Quantized) -> np.ndarray:
    """The dequantised matrix, unrounded."""
    rows, columns = q.values.shape
    block = {"tensor": (rows, columns), "row": (1, columns)}.get(q.format.split("_")[1])
    block_rows, block_columns = block or map(int, q.format.split("_")[1].split("x"))
    scales = np.asarray(q.scales, np.float64).repeat(block_rows, 0).repeat(block_columns, 1)
    return np.asarray(q.values).astype(np.float64) * scales[:rows, :columns]


@pytest.mark.parametrize(
    ("x_format", "w_format"),
    [
        ("e4m3_1x128", "e4m3_128x128"),
        ("e4m3_row", "e4m3_row"),
        ("e4m3_tensor", "e4m3_tensor"),
        ("e5m2_row", "e4m3_128x128"),
    ],
)
def test_fp8_product(x_format: str, w_format: str) -> None:
    """Against float64 of the same quantised numbers, for any K and number of outputs."""
    rng = np.random.default_rng(6)
    for rows, outputs, k in ((5, 7, 33), (70, 200, 1100)):
        # Blocks of K of different sizes, so that a scale at the wrong place shows.
        sizes = np.exp2(rng.integers(-6, 6, -(-k // 128))).repeat(128)[:k]
        x = run((rng.normal(size=(rows, k)) * sizes).astype(np.float32), x_format)
        w = run((rng.normal(size=(outputs, k)) / sizes).astype(np.float32), w_format)
        reference = float64(x) @ float64(w).T
        product = jax.jit(quantized_matmul, static_argnames="dtype")
        assert relative_error(product(x, w), reference) < 2e-6
        assert relative_error(product(x, w, dtype=jnp.bfloat16), reference) < 3e-3


def tensor_core_sum(x: np.ndarray, w: np.ndarray, promotion: int) -> np.ndarray:
    """A row by a row as Hopper's tensor cores add fp8 products: 32 at a time, aligned to the largest and cut to 13 bits
    behind it, (DeepSeek-V3, arXiv 2412.19437, section 3.3.2: about 14 bits), `promotion` products per float32 sum."""
    total = np.float32(0)
    for start in range(0, len(x), promotion):
        sum_ = 0.0
        for i in range(start, min(start + promotion, len(x)), 32):
            terms = np.append(x[i : i + 32] * w[i : i + 32], sum_)
            spacing = 2.0 ** (np.floor(np.log2(np.abs(terms).max())) - 13)
            sum_ = (np.trunc(terms / spacing) * spacing).sum()
        total = np.float32(total + np.float32(sum_))
    return total


def test_a_product_without_promotion_fails_the_gate() -> None:
    """What the gate of 5e-4 is for: sums that stay in the tensor core's few bits over all of K."""
    rng = np.random.default_rng(7)
    x, w = (run(rng.normal(size=(12, 4096)).astype(np.float32), "e4m3_tensor") for _ in range(2))
    reference = float64(x) @ float64(w).T
    scale = float(x.scales[0, 0]) * float(w.scales[0, 0])

    def emulated(promotion: int) -> np.ndarray:
        rows, outputs = (np.asarray(q.values).astype(np.float64) for q in (x, w))
        return np.array([[tensor_core_sum(a, b, promotion) for b in outputs] for a in rows]) * scale

    assert relative_error(emulated(4096), reference) > 5e-4
    assert relative_error(emulated(ops.PROMOTION), reference) < 5e-4 / 3
    assert relative_error(quantized_matmul(x, w), reference) < 2e-6


def test_mistakes_are_named() -> None:
    x = jnp.ones((4, 8), jnp.float32)
    with pytest.raises(ValueError, match="format must be one of int8_tensor"):
        quantize(x, "int4")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        quantize(x.astype(jnp.int32), "int8_row")
    with pytest.raises(ValueError, match=r"rows, K\]"):
        quantize(x[0], "int8_row")
    with pytest.raises(ValueError, match="int8 by int8"):
        quantized_matmul(quantize(x, "int8_row"), quantize(x, "e4m3_row"))
    with pytest.raises(ValueError, match=r"outputs, K\]"):
        quantized_matmul(quantize(x, "int8_row"), quantize(x[:, :4], "int8_row"))
