"""From the rewards of groups of answers to their advantages. G groups (one prompt each), N answers to each.

All take two optional flags per answer, [G, N] bool:

  exclude_from_stats: the answer is left out of what the others are compared with (means, deviations, counts, and the
    answers that diversity compares with). It still gets an advantage, its own reward against the statistics.
  exclude_from_loss: its advantage is 0. Give its tokens a loss mask of 0 as well if it shall not count in the mean
    of the loss either.

A reward under both flags is never looked at and may be NaN. A group with fewer than two answers in its statistics
compares nothing: all of its advantages are 0. Computed in float64, returned as [G, N] float32.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np

DiversityMode = Literal["pairwise", "partition"]

# What a right answer that says the same as all others keeps of its reward, at mode="partition".
PARTITION_FLOOR = 0.1


def group(
    rewards: np.ndarray,
    *,
    normalize_deviation: bool,
    exclude_from_stats: np.ndarray | None = None,
    exclude_from_loss: np.ndarray | None = None,
) -> np.ndarray:
    """Rewards less their group's mean, as in GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.2).

    Args:
      rewards: [G, N], N >= 2.
      normalize_deviation: divide by the group's (population) standard deviation; a deviation of 0 gives 0. Off, as
        in Dr. GRPO (arXiv:2503.20783), groups that are nearly all right or all wrong are not blown up.
      exclude_from_stats, exclude_from_loss: [G, N] bool, see above.

    Returns:
      [G, N] float32; each group sums to 0, and a group of equal rewards is all 0.

    Raises:
      ValueError: another shape, fewer than two answers, or a reward that is not finite.
    """
    values, counted = _checked(rewards, exclude_from_stats, exclude_from_loss)
    scores = _less_mean(values, counted)
    if normalize_deviation:
        number = np.maximum(counted.sum(axis=1, keepdims=True), 1)
        deviation = np.sqrt((scores**2 * counted).sum(axis=1, keepdims=True) / number)
        scores = _divided(scores, deviation)
    return _finished(scores, counted, exclude_from_loss)


def centred(
    rewards: np.ndarray,
    *,
    exclude_from_stats: np.ndarray | None = None,
    exclude_from_loss: np.ndarray | None = None,
) -> np.ndarray:
    """Rewards less their group's mean: `group` without the deviation."""
    return group(
        rewards,
        normalize_deviation=False,
        exclude_from_stats=exclude_from_stats,
        exclude_from_loss=exclude_from_loss,
    )


def rloo(
    rewards: np.ndarray,
    *,
    exclude_from_stats: np.ndarray | None = None,
    exclude_from_loss: np.ndarray | None = None,
) -> np.ndarray:
    """Rewards less the mean of the group's *other* answers (RLOO, Ahmadian et al. 2024, arXiv:2402.14740).

    n / (n - 1) times `centred`, for the n answers in the statistics.

    Args:
      rewards: [G, N], N >= 2.
      exclude_from_stats, exclude_from_loss: [G, N] bool, see above.

    Returns:
      [G, N] float32; each group sums to 0.

    Raises:
      ValueError: as `group`.
    """
    values, counted = _checked(rewards, exclude_from_stats, exclude_from_loss)
    number = counted.sum(axis=1, keepdims=True)
    scores = _less_mean(values, counted)
    # An answer outside of the statistics is not part of its own baseline, so nothing needs to be taken out of it.
    scores = np.where(counted, scores * number / np.maximum(number - 1, 1), scores)
    return _finished(scores, counted, exclude_from_loss)


def batch(
    rewards: np.ndarray,
    *,
    exclude_from_stats: np.ndarray | None = None,
    exclude_from_loss: np.ndarray | None = None,
) -> np.ndarray:
    """Rewards less their group's mean, over the deviation of all rewards of the batch (arXiv:2508.08221, "Lite PPO").

    A group that is nearly all right or all wrong is not blown up, and the scale of the rewards still drops out.

    Args:
      rewards: [G, N], N >= 2; the deviation is the population's, over all answers of all groups.
      exclude_from_stats, exclude_from_loss: [G, N] bool, see above.

    Returns:
      [G, N] float32; each group sums to 0.

    Raises:
      ValueError: as `group`.
    """
    values, counted = _checked(rewards, exclude_from_stats, exclude_from_loss)
    inside = values[counted]
    equal = inside.size == 0 or bool((inside == inside[0]).all())
    deviation = np.asarray(0.0 if equal else inside.std())
    return _finished(_divided(_less_mean(values, counted), deviation), counted, exclude_from_loss)


def pass_at_k(
    rewards: np.ndarray,
    k: int,
    *,
    exclude_from_stats: np.ndarray | None = None,
    exclude_from_loss: np.ndarray | None = None,
) -> np.ndarray:
    """The advantage of single answers where groups of k are rewarded for one right answer among them.

    Source: Chen et al. 2025, "Pass@k Training" (arXiv:2508.10751), and MindGPT-4ov, eq. 2 to 6. With c right of N
    answers, rho = 1 - C(N-c, k) / C(N, k) is the share of groups of k with a right one, sigma^2 = rho (1 - rho) and
    q = C(N-c-1, k-1) / C(N-1, k-1) the share of all-wrong ones among those that hold a given wrong answer:

        A_right = (1 - rho) / sigma,   A_wrong = ((1 - rho) - q) / sigma.

    Eq. 6 of MindGPT-4ov prints only the all-wrong groups' part of A_wrong, without its sign. The advantages of a
    prompt sum to 0, so A_wrong = - c / (N - c) A_right; that is how it is computed, from exact binomials.

    Args:
      rewards: [G, N] of 0 and 1.
      k: answers that are drawn together, 1 <= k <= N; k = 1 is `group` with its deviation.
      exclude_from_stats, exclude_from_loss: [G, N] bool, see above. N and c count the answers in the statistics.

    Returns:
      [G, N] float32; all 0 where c = 0, where every k answers hold a right one (N - c < k), and where fewer than k
      answers are left in the statistics.

    Raises:
      ValueError: rewards that are not 0 or 1, a k outside of 1..N, or as `group`.
    """
    values, counted = _checked(rewards, exclude_from_stats, exclude_from_loss)
    answers = values.shape[1]
    if k != int(k) or not 1 <= k <= answers:
        raise ValueError(f"pass@{k} needs 1 <= k <= {answers} answers per prompt: lower k, or sample more answers")
    if not np.isin(values, (0.0, 1.0)).all():
        place = np.argwhere(~np.isin(values, (0.0, 1.0)))[0].tolist()
        raise ValueError(
            f"pass@k needs rewards of 0 or 1, but [group, answer] {place} has {values[tuple(place)]:g}: give it the "
            "correctness alone, and add shaping (length, format) to the advantages after it"
        )
    right = values == 1.0
    of_group = [
        _pass_at_k(int(number), int(c), int(k))
        for number, c in zip(counted.sum(axis=1), (right & counted).sum(axis=1), strict=True)
    ]
    by_group = np.asarray(of_group, np.float64).reshape(-1, 2)
    scores = np.where(right, by_group[:, :1], by_group[:, 1:])
    return _finished(scores, counted, exclude_from_loss)


def diversity(
    rewards: np.ndarray,
    distance: np.ndarray,
    *,
    mode: DiversityMode = "pairwise",
    exclude_from_stats: np.ndarray | None = None,
    exclude_from_loss: np.ndarray | None = None,
) -> np.ndarray:
    """Correctness times how much an answer differs from its group, centred (MindGPT-4ov, eq. 7 to 9).

    Args:
      rewards: [G, N] correctness, not negative: a factor on a negative reward would reward sameness.
      distance: [G, N, N], see `diversity_factor`.
      mode: see `diversity_factor`.
      exclude_from_stats, exclude_from_loss: [G, N] bool, see above.

    Returns:
      [G, N] float32; each group sums to 0. Not divided by a deviation.

    Raises:
      ValueError: a negative reward, a matrix that is no distance, or as `group`.
    """
    values, counted = _checked(rewards, exclude_from_stats, exclude_from_loss)
    if (values < 0).any():
        raise ValueError(
            "diversity multiplies the correctness, which cannot be negative: add penalties (length, format) after "
            "diversity_factor, and centre the sum"
        )
    factor = diversity_factor(distance, mode, exclude_from_stats=exclude_from_stats)
    if factor.shape != values.shape:
        raise ValueError(f"distance is of {factor.shape} answers, rewards of {values.shape}; give one matrix per group")
    return _finished(_less_mean(values * factor, counted), counted, exclude_from_loss)


def diversity_factor(
    distance: np.ndarray, mode: DiversityMode = "pairwise", *, exclude_from_stats: np.ndarray | None = None
) -> np.ndarray:
    """How much each answer differs from the others of its group, 0..1: Norm(Div) of MindGPT-4ov, eq. 7 and 8.

    Args:
      distance: [G, N, N] in [0, 1], symmetric, 0 on the diagonal and between answers that count as the same (it has
        passed its threshold).
      mode: "pairwise" for the mean distance to the other answers; "partition" for (n - cluster) / (n - 1), at least
        `PARTITION_FLOOR`, where an answer's cluster is all that a chain of equal pairs leads to. Pairwise has no
        floor: where all answers count as the same, right ones earn nothing.
      exclude_from_stats: [G, N] bool, answers that nobody is compared with; they are compared with the others.

    Returns:
      [G, N] float64; 1 for an answer that has nothing to be compared with.

    Raises:
      ValueError: a matrix that is not a distance in [0, 1], or an unknown mode.
    """
    between = np.asarray(distance, np.float64)
    if between.ndim != 3 or between.shape[1] != between.shape[2]:
        raise ValueError(f"distance must be [groups, answers, answers], not of shape {between.shape}")
    if mode not in ("pairwise", "partition"):
        raise ValueError(f"diversity mode must be 'pairwise' or 'partition', not {mode!r}")
    if not ((between >= 0) & (between <= 1)).all():
        raise ValueError("distances must lie in [0, 1] (NaN does not): divide them by the largest that is possible")
    if not np.allclose(between, between.swapaxes(1, 2), rtol=0, atol=1e-6):
        raise ValueError("distances must be symmetric: average both directions, (d + d.T) / 2")
    if np.diagonal(between, axis1=1, axis2=2).any():
        raise ValueError("the distance of an answer to itself must be 0: fill the diagonal with 0")
    counted = ~_flags(exclude_from_stats, between.shape[:2], "exclude_from_stats")
    others = counted[:, None, :] & ~np.eye(between.shape[1], dtype=bool)
    number = others.sum(axis=2)
    if mode == "pairwise":
        factor = (between * others).sum(axis=2) / np.maximum(number, 1)
    else:
        same = between == 0
        # Which answers of the statistics a chain of equal pairs inside the statistics leads to.
        reach = same & counted[:, None, :] & counted[:, :, None]
        for _ in range(max(between.shape[1] - 1, 1).bit_length()):
            reach = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
        cluster = ((same & counted[:, None, :]).astype(np.float32) @ reach.astype(np.float32)) > 0
        factor = np.maximum((number - (cluster & others).sum(axis=2)) / np.maximum(number, 1), PARTITION_FLOOR)
    return np.where(number > 0, factor, 1.0)


@lru_cache(maxsize=4096)
def _pass_at_k(answers: int, right: int, k: int) -> tuple[float, float]:
    """(advantage of a right answer, of a wrong one)."""
    if right == 0 or answers - right < k:
        return 0.0, 0.0
    # 1 - rho, the share of groups of k without a right answer; exact, so large counts neither overflow nor cancel.
    fails = Fraction(math.comb(answers - right, k), math.comb(answers, k))
    positive = math.sqrt(fails / (1 - fails))
    return positive, -positive * right / (answers - right)


def _checked(
    rewards: np.ndarray, exclude_from_stats: np.ndarray | None, exclude_from_loss: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(rewards in float64, 0 where nobody looks; which answers are in the statistics)."""
    values = np.asarray(rewards, np.float64)
    if values.ndim != 2:
        raise ValueError(f"rewards must be [groups, answers], not of shape {values.shape}")
    if values.shape[1] < 2:
        raise ValueError("a group of one answer has nothing to compare with: set at least 2 samples per prompt")
    outside = _flags(exclude_from_stats, values.shape, "exclude_from_stats")
    silent = _flags(exclude_from_loss, values.shape, "exclude_from_loss")
    values = np.where(outside & silent, 0.0, values)
    if not np.isfinite(values).all():
        places = np.argwhere(~np.isfinite(values))[:3].tolist()
        raise ValueError(
            f"rewards are not finite at [group, answer] {places}; a reward function failed. Exclude those answers "
            "from statistics and loss, or repair it"
        )
    return values, ~outside


def _flags(flags: np.ndarray | None, shape: tuple[int, ...], name: str) -> np.ndarray:
    if flags is None:
        return np.zeros(shape, bool)
    array = np.asarray(flags)
    if array.shape != shape or array.dtype != bool:
        raise ValueError(f"{name} must be booleans of shape {shape}, got {array.dtype} of shape {array.shape}")
    return array


def _less_mean(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Less the mean of the group's counted answers; exactly 0 where those are equal, whatever rounding does."""
    number = np.maximum(counted.sum(axis=1, keepdims=True), 1)
    some = np.take_along_axis(values, counted.argmax(axis=1)[:, None], axis=1)
    # From one of them first, so that the mean of equal numbers is that number.
    return values - some - ((values - some) * counted).sum(axis=1, keepdims=True) / number


def _divided(scores: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Over the deviation, 0 where that is 0."""
    return np.where(deviation > 0, scores / np.where(deviation > 0, deviation, 1.0), 0.0)


def _finished(scores: np.ndarray, counted: np.ndarray, exclude_from_loss: np.ndarray | None) -> np.ndarray:
    """0 for what has no part in the loss, and for groups without a comparison."""
    silent = _flags(exclude_from_loss, scores.shape, "exclude_from_loss")
    kept = ~silent & (counted.sum(axis=1, keepdims=True) >= 2)
    return np.where(kept, scores, 0.0).astype(np.float32)
