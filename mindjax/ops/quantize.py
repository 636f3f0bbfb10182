"""Quantised matrices: int8 and float8, one table of formats, the same bits on every backend.

Every matrix is [..., rows, K] with the contracted dimension last: activations [tokens, K], weights [outputs, K]. So
one scale per row is "per token" of an activation and "per channel" of a weight. For rollout: nothing here has a
gradient.

A block's scale is max |x| / largest, 1 where the block is all zero, at least 2^-126; a value is x / scale (divided,
not multiplied by a reciprocal), clipped to +-largest, rounded to nearest even. Numbers below 2^-126 count as zero, as
CPUs and TPUs flush them where GPUs do not. A block with a NaN or an infinity has values 0 and scale NaN, so that all
of it dequantises to NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

_TINY = np.float32(2.0**-126)
# Tensor cores sum fp8 products in fewer bits than float32, so their sums are promoted after this much of K.
PROMOTION = 128


@dataclass(frozen=True)
class Format:
    """How a matrix is quantised.

    Attributes:
      dtype: of the values.
      largest: magnitude that a block's largest maps to.
      block: rows and columns that share a scale; None is all of them.
      mantissa_bits, least_exponent: of a float8 (below 2^least_exponent its values are evenly spaced); None for int8.
    """

    dtype: Any
    largest: float
    block: tuple[int | None, int | None]
    mantissa_bits: int | None = None
    least_exponent: int | None = None


def _e4m3(*block: int | None) -> Format:
    return Format(jnp.float8_e4m3fn, 448.0, (block[0], block[1]), 3, -6)


def _e5m2(*block: int | None) -> Format:
    return Format(jnp.float8_e5m2, 57344.0, (block[0], block[1]), 2, -14)


FORMATS: dict[str, Format] = {
    "int8_tensor": Format(jnp.int8, 127.0, (None, None)),
    "int8_row": Format(jnp.int8, 127.0, (1, None)),  # per token, per channel
    "e4m3_tensor": _e4m3(None, None),
    "e4m3_row": _e4m3(1, None),
    "e4m3_1x128": _e4m3(1, 128),  # activations of DeepSeek, Qwen, vLLM
    "e4m3_128x128": _e4m3(128, 128),  # their weights
    "e5m2_tensor": _e5m2(None, None),
    "e5m2_row": _e5m2(1, None),
}

# Of the activations that meet a weight in this format.
ACTIVATIONS = {"int8_row": "int8_row", "e4m3_128x128": "e4m3_1x128"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A quantised matrix, or a stack of them.

    Attributes:
      values: [..., rows, K] int8 or float8.
      scales: [..., row blocks, column blocks] float32; the number is value * scale.
      format: name in FORMATS.
    """

    values: Array
    scales: Array
    format: str = field(metadata={"static": True})


# Inlined, so that nothing but tracing is shared: a layer quantises activations of few shapes many times.
@partial(jax.jit, static_argnames="format", inline=True)
def quantize(x: Array, format: str) -> Quantized:
    """Quantises each matrix of x [..., rows, K] (float32 or bfloat16); blocks at the edges may be smaller.

    Raises:
      ValueError: for an unknown format, or an x that is no floating-point matrix.
    """
    how = _format(format)
    if x.ndim < 2 or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"quantize takes [..., rows, K] in float32 or bfloat16; got {x.shape} {x.dtype}")
    shape, block = x.shape, _block(x.shape, how)
    x = _split(x.astype(jnp.float32), block)
    finite = jnp.isfinite(x)
    largest = jnp.max(jnp.where(finite, jnp.abs(x), jnp.float32(0)), axis=(-3, -1), keepdims=True)
    largest = jnp.where(largest < _TINY, jnp.float32(0), largest)
    scales = jnp.maximum(_divide(largest, jnp.full_like(largest, how.largest)), _TINY)
    scales = jnp.where(largest == 0, jnp.float32(1), scales)
    whole = jnp.all(finite, axis=(-3, -1), keepdims=True)
    values = _divide(jnp.where(whole, x, jnp.float32(0)), jnp.broadcast_to(scales, x.shape))
    values = _round(jnp.clip(values, -how.largest, how.largest), how).astype(how.dtype)
    scales = jnp.where(whole, scales, jnp.float32(jnp.nan))
    return Quantized(_join(values, shape), scales[..., :, 0, :, 0], format)


def dequantize(q: Quantized, dtype: Any = jnp.float32) -> Array:
    """value * scale in float32, then rounded to `dtype`; [..., rows, K]. Below 2^-126 it is zero."""
    shape = q.values.shape
    values = _split(q.values.astype(jnp.float32), _block(shape, _format(q.format)))
    x = values * q.scales[..., :, None, :, None]
    return _join(jnp.where(jnp.abs(x) < _TINY, jnp.float32(0), x), shape).astype(dtype)


def quantized_matmul(x: Quantized, w: Quantized, *, dtype: Any = jnp.float32) -> Array:
    """x [rows, K] by w [outputs, K] transposed, both quantised: [rows, outputs] in `dtype`.

    int8: the sum is an int32, rounded to float32, times (x's scale times w's): the same bits everywhere. float8:
    products are summed in float32 over 128 of K, each such sum times (x's scale times w's) is added to the result in
    float32, as the kernels do; the order within 128 is the backend's.

    Raises:
      ValueError: for shapes that do not fit, or formats that do not go together.
    """
    if x.values.ndim != 2 or w.values.ndim != 2 or x.values.shape[1] != w.values.shape[1]:
        raise ValueError(
            f"quantized_matmul takes x [rows, K] and w [outputs, K]; got {x.values.shape}, {w.values.shape}"
        )
    integers = [_format(q.format).dtype == jnp.int8 for q in (x, w)]
    if integers[0] != integers[1]:
        raise ValueError(f"quantized_matmul multiplies int8 by int8 or float8 by float8; got {x.format} by {w.format}")
    contracted = (((1,), (1,)), ((), ()))
    if integers[0]:
        total = lax.dot_general(x.values, w.values, contracted, preferred_element_type=jnp.int32)
        return (total.astype(jnp.float32) * (x.scales * w.scales.T)).astype(dtype)

    def blocks(q: Quantized) -> tuple[Array, Array]:
        """Values [blocks, rows, 128] and scales [blocks, rows or 1, 1], block by block of K."""
        rows, k = q.values.shape
        row_block, k_block = _format(q.format).block
        # bfloat16 holds every float8 exactly.
        values = jnp.pad(q.values.astype(jnp.bfloat16), ((0, 0), (0, -k % PROMOTION)))
        values = values.reshape(rows, -1, PROMOTION).swapaxes(0, 1)
        scales = q.scales if k_block is not None else jnp.broadcast_to(q.scales, (q.scales.shape[0], len(values)))
        if row_block not in (1, None):
            scales = jnp.repeat(scales, row_block, axis=0, total_repeat_length=rows)
        return values, scales.T[:, :, None]

    def add_block(total: Array, block: tuple[tuple[Array, Array], tuple[Array, Array]]) -> tuple[Array, None]:
        (x_values, x_scales), (w_values, w_scales) = block
        product = lax.dot_general(x_values, w_values, contracted, preferred_element_type=jnp.float32)
        return total + product * (x_scales * w_scales.T), None

    total = jnp.zeros((x.values.shape[0], w.values.shape[0]), jnp.float32)
    return lax.scan(add_block, total, (blocks(x), blocks(w)))[0].astype(dtype)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {name!r}")
    return FORMATS[name]


# ---- blocks


def _block(shape: tuple[int, ...], how: Format) -> tuple[int, int]:
    rows, columns = (size or whole for size, whole in zip(how.block, shape[-2:], strict=True))
    return max(1, rows), max(1, columns)


def _split(x: Array, block: tuple[int, int]) -> Array:
    """[..., rows, K] to [..., row blocks, block rows, column blocks, block columns], with zeros at the edges."""
    (rows, columns), (block_rows, block_columns) = x.shape[-2:], block
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -rows % block_rows), (0, -columns % block_columns)])
    return x.reshape(*x.shape[:-2], -(-rows // block_rows), block_rows, -(-columns // block_columns), block_columns)


def _join(x: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_split`."""
    x = x.reshape(*shape[:-2], x.shape[-4] * x.shape[-3], x.shape[-2] * x.shape[-1])
    return x[..., : shape[-2], : shape[-1]]


# ---- arithmetic whose bits no backend changes


def _divide(x: Array, y: Array) -> Array:
    """The float32 nearest to x / y, for y > 0, neither infinite nor NaN; 0 where x or the result is below 2^-126.

    `x / y` alone is not that: XLA multiplies by the reciprocal of a constant or a broadcast divisor, and GPUs and TPUs
    divide approximately. Here a float quotient, right to 4 units of its last place, is corrected by the remainder,
    which integers give exactly.
    """
    x_bits, y_bits = (lax.bitcast_convert_type(a, jnp.int32) for a in (x, y))
    (x_exponent, x_mantissa), (y_exponent, y_mantissa) = (_exponent_and_mantissa(bits) for bits in (x_bits, y_bits))
    below = (x_mantissa < y_mantissa).astype(jnp.int32)
    x_mantissa <<= below  # the quotient of the mantissas is in [1, 2)
    guess = x_mantissa.astype(jnp.float32) / y_mantissa.astype(jnp.float32)
    quotient = (guess * jnp.float32(2**23)).astype(jnp.int32)
    # Both products wrap; their difference is small and comes out exact.
    remainder = 2 * ((x_mantissa << 23) - quotient * y_mantissa)
    for odd in (1, 3, 5, 7):
        quotient += (remainder > odd * y_mantissa).astype(jnp.int32)
        quotient -= (remainder < -odd * y_mantissa).astype(jnp.int32)
    exponent = x_exponent - y_exponent - below + 127
    # Added, so that a quotient that rounds up to 2^24 carries into the exponent.
    magnitude = ((exponent - 1) << 23) + quotient
    bits = jnp.where((x_exponent == 0) | (exponent < 1), 0, magnitude) | (x_bits & np.int32(-(2**31)))
    return lax.bitcast_convert_type(bits, jnp.float32)


def _exponent_and_mantissa(bits: Array) -> tuple[Array, Array]:
    """Biased exponent and 24-bit mantissa of normal float32 numbers given as int32."""
    return (bits >> 23) & 0xFF, (bits & 0x7FFFFF) | 0x800000


def _round(x: Array, how: Format) -> Array:
    """Float32 numbers within +-largest to the nearest that the format holds, ties to even; the cast is then exact.

    Casts of backends differ: some saturate, some go through float16 and round twice.
    """
    if how.mantissa_bits is None or how.least_exponent is None:
        return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    exponent = _exponent_and_mantissa(lax.bitcast_convert_type(x, jnp.int32))[0]
    exponent = jnp.maximum(exponent, how.least_exponent + 127) - how.mantissa_bits  # of the spacing
    spacing, inverse = (lax.bitcast_convert_type(e << 23, jnp.float32) for e in (exponent, 254 - exponent))
    return lax.round(x * inverse, lax.RoundingMethod.TO_NEAREST_EVEN) * spacing
