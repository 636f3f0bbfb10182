"""How different answers are, for the diversity advantage (eq. 7 to 9)."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# texts [N] -> [N, N] float32 in 0..1, symmetric, 0 on the diagonal
Distance = Callable[[Sequence[str]], np.ndarray]
# pairs of texts -> for each, the probability that they say the same
PairClassifier = Callable[[Sequence[tuple[str, str]]], np.ndarray]


@dataclass(frozen=True)
class DistanceConfig:
    """When two answers count as different.

    Attributes:
      kind: "lexical" compares counts of characters, pairs and triples of them; "exact" the normalised text;
        "classifier" asks a sequence-pair classifier whether both say the same.
      folder: of the classifier, as transformers saves one.
      threshold: distance, 0 to 1, from which on two answers are different: 1, below it 0; 0 keeps the distance itself.
        The default is for "lexical": "red circle" is 0.30 away from "blue circle" and 0.12 from "a red circle". A
        classifier has one of its own, 0.5 if its probabilities are taken at their word.
    """

    kind: Literal["lexical", "exact", "classifier"] = "lexical"
    folder: str = ""
    threshold: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"distance: threshold is {self.threshold}, but distances lie between 0 and 1")
        if (self.kind == "classifier") != bool(self.folder):
            raise ValueError("distance: kind 'classifier' needs a folder, and no other kind reads one")

    def build(self, load: Callable[[str], PairClassifier] | None = None) -> Distance:
        """The distance of all pairs of some texts; which one it is goes to the log.

        Args:
          load: opens the classifier's folder, `mindjax.interop.pair_classifier.load`; only kind "classifier" needs it.

        Raises:
          ValueError: a classifier is asked for and nothing can load it.
        """
        folder = f" of {self.folder}" if self.folder else ""
        print(f"distance between answers: {self.kind}{folder}, different from {self.threshold:g} on", flush=True)
        if self.kind == "classifier":
            if load is None:
                raise ValueError("distance: pass build() what loads a classifier, mindjax.interop.pair_classifier.load")
            classifier = load(self.folder)

            def measure(texts: Sequence[str]) -> np.ndarray:
                return _classified(texts, classifier)
        else:
            measure = lexical if self.kind == "lexical" else exact

        def distance(texts: Sequence[str]) -> np.ndarray:
            measured = measure(texts)
            if self.threshold:
                measured = (measured >= self.threshold) & ~np.eye(len(texts), dtype=bool)
            return measured.astype(np.float32)

        return distance


def normalised(text: str) -> str:
    """The text without what does not make it another answer: case, spacing, the full stop."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).rstrip(".。 ")


def exact(texts: Sequence[str]) -> np.ndarray:
    """1 where the normalised texts differ, [N, N]."""
    _, kinds = np.unique([normalised(text) for text in texts], return_inverse=True)
    return (kinds[:, None] != kinds[None]).astype(np.float64)


def lexical(texts: Sequence[str]) -> np.ndarray:
    """1 minus the cosine of the counts of all runs of 1 to 3 characters, ends marked, [N, N]."""
    counts = []
    for text in texts:
        marked = f"\x02{normalised(text)}\x03"
        counts.append(Counter(marked[i : i + n] for n in (1, 2, 3) for i in range(len(marked) - n + 1)))
        for mark in "\x02\x03":
            del counts[-1][mark]
    columns = {gram: i for i, gram in enumerate(sorted(set().union(*counts)))}
    table = np.zeros((len(texts), len(columns)))
    for row, count in zip(table, counts, strict=True):
        for gram, number in count.items():
            row[columns[gram]] = number
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    same = np.array([normalised(text) for text in texts])
    return np.where(same[:, None] == same[None], 0.0, np.clip(1 - table @ table.T, 0, 1))


def _classified(texts: Sequence[str], classifier: PairClassifier) -> np.ndarray:
    """1 minus the probability that two texts say the same, the mean of both orders, [N, N]."""
    names = sorted({normalised(text) for text in texts})
    place = {name: i for i, name in enumerate(names)}
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    table = np.zeros((len(names), len(names)))
    if pairs:
        same = np.asarray(classifier([*pairs, *((b, a) for a, b in pairs)]), np.float64).reshape(2, -1).mean(0)
        for (a, b), probability in zip(pairs, same, strict=True):
            table[place[a], place[b]] = table[place[b], place[a]] = 1 - probability
    index = [place[normalised(text)] for text in texts]
    return table[np.ix_(index, index)]
