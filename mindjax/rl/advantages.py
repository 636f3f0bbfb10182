"""From the rewards of a group of answers to one prompt to their advantages. G groups, N answers each."""

from __future__ import annotations

import numpy as np


def group(rewards: np.ndarray, *, normalize_deviation: bool) -> np.ndarray:
    """Rewards less their group's mean, as in GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.2).

    Args:
      rewards: [G, N], N >= 2.
      normalize_deviation: divide by the group's (population) standard deviation. Off, as in Dr. GRPO
        (arXiv:2503.20783), groups that are nearly all right or all wrong are not blown up.

    Returns:
      [G, N] float32; each group sums to 0, and a group of equal rewards is all 0.

    Raises:
      ValueError: another shape, fewer than two answers, or a reward that is not finite.
    """
    values = np.asarray(rewards, np.float64)
    if values.ndim != 2:
        raise ValueError(f"rewards must be [groups, answers], not of shape {values.shape}")
    if values.shape[1] < 2:
        raise ValueError("a group of one answer has nothing to compare with: set at least 2 samples per prompt")
    if not np.isfinite(values).all():
        places = np.argwhere(~np.isfinite(values))[:3].tolist()
        raise ValueError(f"rewards are not finite at [group, answer] {places}; a reward function failed")
    # Exactly 0 where all rewards are equal, whatever rounding does to their mean.
    differs = values != values[:, :1]
    centred = np.where(differs.any(axis=1, keepdims=True), values - values.mean(axis=1, keepdims=True), 0.0)
    if normalize_deviation:
        deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True))
        centred = centred / np.where(deviation > 0, deviation, 1.0)
    return centred.astype(np.float32)
