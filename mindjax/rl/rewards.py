"""Rewards of a trajectory by name, and how they add up: weights, gates, and routing by task."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mindjax.rl.verifiers import Verifier
from mindjax.types import Sample, Trajectory

# What a reward of one's own looks like: (what was sampled, what it was sampled for) -> rewards by name.
Reward = Callable[[Trajectory, Sample], Mapping[str, float]]
BUILT_IN = ("correct", "length", "format", "repetition", "redundant", "iou")


@dataclass(frozen=True)
class Scored:
    """What a trajectory earned, in two parts, as diversity and Pass@k look at the first alone.

    Attributes:
      correct: for being right, weighted: 0 or 1 where its weight is 1 and the verdict is yes or no.
      shaping: the weighted sum of all other parts.
    """

    correct: float
    shaping: float

    @property
    def total(self) -> float:
        return self.correct + self.shaping


@dataclass(frozen=True)
class RewardConfig:
    """What is rewarded, and how much. A part without a weight is switched off.

    A cut or redundant answer is judged as any other: wrong is 0, and nothing below 0 but what has a weight here.

    Attributes:
      correct: weight of a right answer.
      length: weight of the length reward, see `length_reward`.
      max_length: tokens at which the length reward is -1; 0 means the longest answer that is sampled.
      soft_length: tokens before that, over which it falls from 0.
      format: weight of the right form, 1 or 0.
      format_pattern: regular expression for the whole of the last turn; empty asks for a closed `\\boxed{}`.
      repetition: weight of repeated n-grams, 0 to -1, see `repetition_reward`.
      repetition_ngram: tokens of an n-gram.
      redundant: weight of a rollout that was stopped as it went round in circles, 0 or -1.
      iou: weight of the overlap with the box of the answer, 0 to 1; for answers of kind "box".
      custom: rewards of one's own, as "package.module:function"; see `Reward`. One that returns "correct" judges in the
        verifier's place.
      custom_weights: (name, weight) of their parts.
      gates: (part, condition): the part counts only where the condition, another part, is at least 1, as ("correct",
        "format"). The condition needs no weight.
      routes: (task, part, weight): samples of that task, a regular expression for its whole name, give the part this
        weight instead; the first that fits counts.
      timeout: seconds of computing that mathematics or a pattern in one answer may cost, see `Verifier`.
    """

    correct: float = 1.0
    length: float = 0.0
    max_length: int = 0
    soft_length: int = 0
    format: float = 0.0
    format_pattern: str = ""
    repetition: float = 0.0
    repetition_ngram: int = 4
    redundant: float = 0.0
    iou: float = 0.0
    custom: tuple[str, ...] = ()
    custom_weights: tuple[tuple[str, float], ...] = ()
    gates: tuple[tuple[str, str], ...] = ()
    routes: tuple[tuple[str, str, float], ...] = ()
    timeout: float = 3.0

    def __post_init__(self) -> None:
        names = [*BUILT_IN, *(name for name, _ in self.custom_weights)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"reward: {sorted(twice)} has more than one weight; rename the part of your own")
        for name in [part for gate in self.gates for part in gate] + [part for _, part, _ in self.routes]:
            if name not in names:
                raise ValueError(f"reward: there is no part {name!r} to gate or route; there are {', '.join(names)}")
        for pattern in (self.format_pattern, *(task for task, _, _ in self.routes)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"reward: {pattern!r} is not a regular expression: {error}") from None
        if self.repetition_ngram < 1:
            raise ValueError("reward: repetition_ngram must be at least 1")
        if "length" in self._needed and not self.soft_length:
            raise ValueError("reward: soft_length must be positive when length is; over so many tokens it falls to -1")
        if self.custom_weights and not self.custom:
            raise ValueError("reward: custom_weights name parts of `custom` functions, and there is none")

    @property
    def _needed(self) -> frozenset[str]:
        """Parts that something looks at."""
        weighted = {name for name, weight in self._weights().items() if weight}
        routed = {part for _, part, weight in self.routes if weight}
        return frozenset(weighted | routed | {condition for _, condition in self.gates} | {"correct"})

    def _weights(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in BUILT_IN} | dict(self.custom_weights)

    def build(self, max_new_tokens: int) -> Rewarder:
        """What computes these rewards for answers of at most `max_new_tokens` tokens.

        Raises:
          ValueError: lengths that do not fit, or a function that is not there.
        """
        longest = self.max_length or max_new_tokens
        if self.soft_length > longest:
            raise ValueError(
                f"reward: soft_length {self.soft_length} is more than the longest answer, {longest} tokens"
            )
        return Rewarder(self, longest, [_function(name) for name in self.custom])


class Rewarder:
    """Computes rewards; holds a worker process once an answer needs one, so close it, or use it in a `with`."""

    def __init__(self, config: RewardConfig, longest: int, custom: Sequence[Reward] = ()) -> None:
        """
        Args:
          config: what is rewarded.
          longest: tokens at which the length reward is -1.
          custom: the functions of `config.custom`.
        """
        self._config, self._longest, self._custom = config, longest, tuple(custom)
        self._needed, self._weights = config._needed, config._weights()
        self._verifier = Verifier(config.timeout)

    def parts(self, trajectory: Trajectory, sample: Sample) -> dict[str, float]:
        """The rewards by name, neither weighted nor gated; "correct", 0 to 1, is always among them.

        Raises:
          ValueError: nothing says what is right, or two functions name one part.
        """
        parts: dict[str, float] = {}
        for function in self._custom:
            for name, value in function(trajectory, sample).items():
                if name in parts or (name in BUILT_IN and name != "correct"):
                    raise ValueError(f"reward: two functions give the part {name!r}; rename one")
                parts[name] = float(value)
        if "correct" not in parts:
            parts["correct"] = self._verifier(trajectory.text, sample.answer)
        if "length" in self._needed:
            parts["length"] = length_reward(
                trajectory.policy_tokens, longest=self._longest, soft=self._config.soft_length
            )
        if "format" in self._needed:
            parts["format"] = self._verifier.form(trajectory.text, self._config.format_pattern)
        if "repetition" in self._needed:
            parts["repetition"] = repetition_reward(trajectory, self._config.repetition_ngram)
        if "redundant" in self._needed:
            parts["redundant"] = -float("redundant" in trajectory.flags)
        if "iou" in self._needed:
            parts["iou"] = self._verifier.overlap(trajectory.text, sample.answer)
        return parts

    def combine(self, parts: Mapping[str, float], sample: Sample) -> Scored:
        """The weighted, gated sum for a sample of this task.

        Raises:
          ValueError: a part that has a weight here is missing, or one that a function gave has none.
        """
        config = self._config
        weights = self._weights | {
            part: weight for task, part, weight in reversed(config.routes) if re.fullmatch(task, sample.task)
        }
        if unweighted := sorted(parts.keys() - weights.keys()):
            raise ValueError(
                f"reward: {', '.join(unweighted)} has no weight; name it in custom_weights, 0 only logs it"
            )
        values = {}
        for name, weight in weights.items():
            conditions = [condition for part, condition in config.gates if part == name] if weight else []
            if missing := sorted({name, *conditions} - parts.keys() if weight else ()):
                raise ValueError(
                    f"reward: {', '.join(missing)} counts for task {sample.task!r}, but no function gave it; there are "
                    f"{', '.join(sorted(parts))}"
                )
            values[name] = weight * parts[name] if weight and all(parts[c] >= 1 for c in conditions) else 0.0
        return Scored(values["correct"], sum(value for name, value in values.items() if name != "correct"))

    def counters(self) -> dict[str, float]:
        """How many answers were not judged in full since the last call, by reason, see `Verifier.counters`."""
        return self._verifier.counters()

    def close(self) -> None:
        """Ends the worker; may be called again, and a later answer starts a new one."""
        self._verifier.close()

    def __enter__(self) -> Rewarder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def length_reward(length: int, *, longest: int, soft: int) -> float:
    """0 up to `longest - soft` tokens, then linear to -1 at `longest`, -1 beyond.

    Source: eq. 10 of the MindGPT-4ov report, the soft overlong punishment of DAPO (arXiv:2503.14476, eq. 13).
    """
    return -min(max((length - (longest - soft)) / soft, 0.0), 1.0)


def repetition_reward(trajectory: Trajectory, ngram: int) -> float:
    """Minus the share of the policy's n-grams of tokens that it has said before, 0 to -1.

    Tokens, not words: Chinese does not part its words. No n-gram reaches from one turn into the next.
    """
    grams = [
        segment.token_ids[start : start + ngram]
        for segment in trajectory.segments
        if segment.author == "policy"
        for start in range(len(segment.token_ids) - ngram + 1)
    ]
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


def _function(name: str) -> Reward:
    """What "package.module:function" names."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward: custom {name!r} is not a package.module:function that is there: {error}") from None
