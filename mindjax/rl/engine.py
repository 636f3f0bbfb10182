"""What samples answers: the protocol of rollout engines, and the native one.

An engine holds weights of its own, which the trainer replaces in place; the loop does not know which one it talks to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mindjax.data.render import Rendered
from mindjax.inference.sampler import SamplingConfig
from mindjax.types import Array, Completion

Params = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """A conversation to go on with.

    Attributes:
      rendered: it, up to where the next token is sampled.
      images: its pictures in order, as they stand in the messages, for engines that process pixels themselves.
    """

    rendered: Rendered
    images: tuple[Any, ...] = ()


class RolloutEngine(Protocol):
    """Samples answers from weights that it is given."""

    def update(self, params: Params, version: int) -> None:
        """Replaces the weights; whatever old ones computed (prefixes, pictures) is forgotten. Returns when done."""

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig, keys: Array) -> list[list[Completion]]:
        """`sampling.num_samples` answers to each request, log-probabilities as `mindjax.inference.sampler.generate`.

        Args:
          keys: [requests, num_samples] PRNG keys; an answer depends on its key, the request and the weights alone.
        """

    def close(self) -> None:
        """Lets go of processes and memory; may be called again."""
