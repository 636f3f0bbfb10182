"""Rewards of one answer, by name, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mindjax.rl.verifiers import verify
from mindjax.types import Sample

# (the sample, the text of an answer, its length in tokens) -> rewards by name. "correct" must be among them, 0 or 1:
# pass@1 and the share of informative groups are read from it.
RewardFn = Callable[[Sample, str, int], Mapping[str, float]]


@dataclass(frozen=True)
class RewardConfig:
    """What is rewarded, and how much.

    Attributes:
      correct: weight of a right answer.
      length: weight of the length reward, 0 to leave it out.
      max_length: tokens at which the length reward is -1; 0 means the longest answer that is sampled.
      soft_length: tokens before that, over which it falls from 0.
    """

    correct: float = 1.0
    length: float = 0.0
    max_length: int = 0
    soft_length: int = 0

    def __post_init__(self) -> None:
        if self.length and not self.soft_length:
            raise ValueError("reward: soft_length must be positive when length is; over so many tokens it falls to -1")

    def weights(self) -> dict[str, float]:
        return {"correct": self.correct} | ({"length": self.length} if self.length else {})

    def function(self, max_new_tokens: int) -> RewardFn:
        """The rewards that have a weight."""
        longest = self.max_length or max_new_tokens
        if self.soft_length > longest:
            raise ValueError(
                f"reward: soft_length {self.soft_length} is more than the longest answer, {longest} tokens"
            )

        def rewards(sample: Sample, text: str, length: int) -> dict[str, float]:
            parts = {"correct": verify(text, sample.answer)}
            if self.length:
                parts["length"] = length_reward(length, longest=longest, soft=self.soft_length)
            return parts

        return rewards


def length_reward(length: int, *, longest: int, soft: int) -> float:
    """0 up to `longest - soft` tokens, then linear to -1 at `longest`, -1 beyond.

    Source: eq. 10 of the MindGPT-4ov report, the soft overlong punishment of DAPO (arXiv:2503.14476, eq. 13).
    """
    return -min(max((length - (longest - soft)) / soft, 0.0), 1.0)


def total(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted sum.

    Raises:
      ValueError: a reward without a weight, or a weight without a reward.
    """
    if parts.keys() != weights.keys():
        raise ValueError(f"rewards are named {sorted(parts)}, their weights {sorted(weights)}; name both alike")
    return sum(weights[name] * parts[name] for name in weights)
