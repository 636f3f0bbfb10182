"""Rotary positions: interleaved M-RoPE for text, row and column for vision; float32, as positions reach 10^5."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.config import TextConfig, VisionConfig


def text_rope(positions: jax.Array, config: TextConfig) -> tuple[jax.Array, jax.Array]:
    """Interleaved M-RoPE: frequencies turn by time, height, width, time, height, ... while a section lasts.

    Args:
      positions: [B, T, 3] int32, (time, height, width).

    Returns:
      cos, sin: [B, T, head_dim / 2] float32.
    """
    half = config.head_dim // 2
    axis = np.zeros(half, np.int32)
    for dim in (1, 2):  # height and width take every third frequency, time keeps the rest
        axis[dim : config.mrope_section[dim] * 3 : 3] = dim
    inverse = _inverse_frequencies(config.rope_theta, config.head_dim)
    angles = positions.astype(jnp.float32)[..., axis] * jnp.asarray(inverse)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def vision_rope(coordinates: jax.Array, config: VisionConfig) -> tuple[jax.Array, jax.Array]:
    """Axial rope: the first half of the frequencies turn by row, the second by column.

    Args:
      coordinates: [R, L, 4] int32, (row, column, height, width).

    Returns:
      cos, sin: [R, L, head_dim / 2] float32.
    """
    inverse = jnp.asarray(_inverse_frequencies(config.rope_theta, config.head_dim // 2))
    angles = coordinates[..., :2].astype(jnp.float32)[..., None] * inverse[None, None, None]
    angles = angles.reshape(*coordinates.shape[:2], config.head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def _inverse_frequencies(theta: float, dim: int) -> np.ndarray:
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))).astype(np.float32)
