"""Answers that go round in circles, found while they are decoded.

R rows, W the longest cycle looked for. A row's last n x p tokens are a cycle of p tokens n times over where the newest
p (n - 1) of them each equal the token p places before. So a run length per p is all that has to be kept, and a step
costs R x W comparisons, whatever the length of the answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cycles:
    """What is known of the cycles that rows are in.

    Attributes:
      recent: [R, W] int32, the token p places back at p - 1; -1 before an answer's first.
      runs: [R, W] int32, how many of the newest tokens in a row equal the one p places before them.
    """

    recent: Array
    runs: Array

    @classmethod
    def empty(cls, rows: int, longest: int) -> Cycles:
        return cls(jnp.full((rows, longest), -1, jnp.int32), jnp.zeros((rows, longest), jnp.int32))

    def add(self, tokens: Array) -> Cycles:
        """With one new token per row, [R] int32."""
        runs = jnp.where(tokens[:, None] == self.recent, self.runs + 1, 0)
        return Cycles(jnp.concatenate([tokens[:, None], self.recent[:, :-1]], axis=1), runs)

    def found(self, window: Array, count: Array, length: Array) -> Array:
        """[R] bool: a cycle of at most `window` tokens has come `count` times, over at least `length` tokens."""
        period = jnp.arange(1, self.runs.shape[1] + 1, dtype=jnp.int32)
        needed = jnp.maximum(period * (count - 1), length - period)
        return jnp.any((self.runs >= needed) & (period <= window), axis=1)
