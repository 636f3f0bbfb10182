"""How sure a measured accuracy is: intervals, paired comparisons, and what guessing blindly would reach."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindjax.data.tasks.verify import is_right
from mindjax.types import Sample

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """`f"{interval:.1%}"` and the like, each bound in that format."""
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def wilson(right: float, total: int) -> Interval:
    """The Wilson score interval of a share (Wilson 1927), which stays inside 0..1 and is sound near its ends.

    Raises:
      ValueError: nothing was counted, or more was right than counted.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} of {total} is no share")
    share, z = right / total, Z_95
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    # At the ends the bound is the share itself; rounding must not put it outside.
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def bootstrap(scores: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of per-item scores with its percentile bootstrap interval, for scores that are not just 0 or 1."""
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores must be a list of numbers, one per item, not of shape {values.shape}")
    return _resampled(values[None], seed)


def paired_bootstrap(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *, seed: int = 0) -> Interval:
    """The mean difference a - b, with an interval that honours both the choice of items and of seeds.

    Both arms answer the same items, so the differences of items are resampled, not the arms one by one. With several
    seeds these are resampled first, and items inside each: a gain that one lucky seed carries does not pass.

    Args:
      a, b: [seeds][items] scores; the items of a seed are in the same order in both.
      seed: of the resampling.

    Raises:
      ValueError: the arms do not cover the same items.
    """
    if len(a) != len(b) or not len(a) or any(len(x) != len(y) or not len(x) for x, y in zip(a, b, strict=True)):
        raise ValueError("the arms of a paired comparison need the same seeds and the same items in each")
    differences = [np.asarray(x, np.float64) - np.asarray(y, np.float64) for x, y in zip(a, b, strict=True)]
    return _resampled(differences, seed)


def _resampled(groups: Sequence[np.ndarray] | np.ndarray, seed: int) -> Interval:
    """Mean over groups of their means; groups, then members, are drawn with replacement."""
    rng = np.random.default_rng(seed)
    mean = float(np.mean([group.mean() for group in groups]))
    # [groups, RESAMPLES] means of resampled members, made once; then whole groups are drawn.
    means = np.stack([group[rng.integers(len(group), size=(RESAMPLES, len(group)))].mean(1) for group in groups])
    if len(groups) > 1:
        chosen = rng.integers(len(groups), size=(len(groups), RESAMPLES))
        # Members are drawn anew for each appearance of a group: another column of its resampled means.
        column = rng.integers(RESAMPLES, size=chosen.shape)
        means = means[chosen, column]
    low, high = np.quantile(means.mean(0), [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def blind_baseline(train: Sequence[Sample], held_out: Sequence[Sample]) -> float:
    """What the best constant reply to each question reaches on held-out items without looking.

    For each question text the reply that is right most often on the training items is given to all held-out items
    with that question; a question never seen in training gets the reply that is right most often over all.

    Raises:
      ValueError: there is nothing to learn from or to judge.
    """
    if not train or not held_out:
        raise ValueError("a blind baseline needs training items to learn from and held-out items to judge")
    by_question: dict[str, list[Sample]] = defaultdict(list)
    for sample in train:
        by_question[_question(sample)].append(sample)
    overall = _best_reply(train)
    best = {question: _best_reply(samples) for question, samples in by_question.items()}
    right = [is_right(_answer(sample), best.get(_question(sample), overall)) for sample in held_out]
    return float(np.mean(right))


def _best_reply(samples: Sequence[Sample]) -> str:
    """Among the most frequent demonstrations, the one that most samples accept."""
    replies = Counter(str(sample.messages[-1]["content"]) for sample in samples)
    candidates = [reply for reply, _ in replies.most_common(100)]
    judged = samples[:400]
    return max(candidates, key=lambda reply: sum(is_right(_answer(sample), reply) for sample in judged))


def _question(sample: Sample) -> str:
    content = sample.messages[0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def _answer(sample: Sample) -> dict[str, Any]:
    if sample.answer is None:
        raise ValueError(f"sample {sample.id!r} has no verifiable answer")
    return sample.answer
