"""What a parity report is made of: rows of numbers, the bounds that judge them, and the numbers themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

# See `parity` for where each applies.
FLOAT32, LOGITS, TIER_1, TIER_2, CALC_DIFF, TIER_3, ROUNDINGS, TIER_4 = 1e-5, 1e-4, 5e-4, 4.5e-2, 1e-3, 3e-3, 1.5, 3e-3


@dataclass(frozen=True)
class Bound:
    """A limit of one of a row's metrics, and where it comes from."""

    metric: str
    limit: float
    source: str
    at_least: bool = False

    def holds(self, metrics: Mapping[str, float]) -> bool:
        value = metrics[self.metric]
        return bool(value >= self.limit if self.at_least else value <= self.limit)  # NaN holds nothing


@dataclass(frozen=True)
class Row:
    """One operation, product or comparison of whole answers; without bounds it is told and not judged."""

    where: str
    metrics: dict[str, float]
    bounds: tuple[Bound, ...] = ()

    @property
    def passed(self) -> bool:
        return all(bound.holds(self.metrics) for bound in self.bounds)


@dataclass(frozen=True)
class Report:
    """One model in one precision against one implementation.

    Attributes:
      layers: operations in the order in which they run, then 8-bit products.
      ends: whole answers.
    """

    model: str
    dtype: str
    against: str
    layers: list[Row] = field(default_factory=list)
    ends: list[Row] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(row.passed for row in (*self.layers, *self.ends))

    @property
    def first_departure(self) -> str | None:
        """The first row past its bound, in the order in which the model runs."""
        return next((row.where for row in (*self.layers, *self.ends) if not row.passed), None)

    def as_dict(self) -> dict[str, Any]:
        rows = {
            name: [{**asdict(row), "passed": row.passed} for row in getattr(self, name)] for name in ("layers", "ends")
        }
        head = {"model": self.model, "dtype": self.dtype, "against": self.against}
        return {**head, "passed": self.passed, "first_departure": self.first_departure, **rows}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b|| in float64; 0 where both are nothing."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = np.linalg.norm(b)
    return float(np.linalg.norm(a - b) / size) if size else float(np.linalg.norm(a))


def calc_diff(a: np.ndarray, b: np.ndarray) -> float:
    """1 - 2 a.b / (a.a + b.b), as DeepGEMM measures it."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(1 - 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum()))


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats of each row of logits [N, V]."""
    p, q = (log_softmax(x.astype(np.float64)) for x in (p_logits, q_logits))
    return (np.exp(p) * (p - q)).sum(-1)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def same_experts(a: np.ndarray, b: np.ndarray) -> float:
    """The share of (token, choice) pairs that both have, [N, k] each."""
    return float(np.mean((a[:, :, None] == b[:, None, :]).any(-1)))
