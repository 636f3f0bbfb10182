"""The rotation of rotary positions."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from kernels_cuda import jax_fused
from mindjax.ops.dispatch import on_cpu

Array = jax.Array


@jax.custom_vjp
def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates x [B, T, N, D] by cos, sin [B, T, D / 2], in float32; the pairs are (i, i + D / 2).

    No gradient reaches the angles.
    """
    return _turn(x, cos, sin, 1.0)


def _turn(x: Array, cos: Array, sin: Array, sign: float) -> Array:
    return on_cpu(partial(jax_fused.rope, sign=sign), partial(_turn_by_parts, sign=sign), x, cos, sin)


def _turn_by_parts(x: Array, cos: Array, sin: Array, sign: float) -> Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sign * sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    cos, sin = saved
    return _turn(g, cos, sin, -1.0), jnp.zeros_like(cos), jnp.zeros_like(sin)


rotate.defvjp(lambda x, cos, sin: (rotate(x, cos, sin), (cos, sin)), _backward)
