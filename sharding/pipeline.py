"""The circular pipeline: every stage holds some layers, rows pass the stages in microbatches, in one or more rounds.

Stage s works on item t - s in tick t. Item k is microbatch k % M in round k // M; from the last stage it returns to the
first for its next round. With R rounds there are R M + S - 1 ticks of 1 / R of a stage's layers each, of which S - 1
are bubble: (S - 1) / (R M + S - 1) of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# (x of a microbatch, its number, the round) -> (x after this stage's layers of the round, statistics of these layers)
Run = Callable[[Array, Array, Array], tuple[Array, Any]]


def bubble_share(stages: int, microbatches: int, rounds: int) -> float:
    """The share of a stage's time in which it has nothing to work on."""
    return (stages - 1) / (rounds * microbatches + stages - 1)


def pipeline(run: Run, x: Array, *, stages: int, microbatches: int, rounds: int) -> tuple[Array, Any]:
    """Sends microbatches through all stages; to be called on every stage, inside `jax.shard_map`.

    Args:
      run: a stage's work.
      x: [M, ...], what enters the first stage, the same on all.
      stages, microbatches, rounds: S, M >= S and R.

    Returns:
      (x after the last layer, [M, ...], valid on the last stage and zero on the others, statistics of this stage's
      layers summed over microbatches [R, ...]).
    """
    stage = lax.axis_index("stage")
    items = rounds * microbatches
    wait = microbatches - stages  # ticks between the return of an item and its next round

    def tick(carry: tuple[Array, Array, Any], t: Array) -> tuple[Any, Array]:
        arrived, waiting, totals = carry
        item = t - stage
        valid = (item >= 0) & (item < items)
        item = jnp.clip(item, 0, items - 1)
        number, turn = item % microbatches, item // microbatches
        entering = lax.dynamic_index_in_dim(x, number, keepdims=False)
        if rounds > 1:
            # The first stage keeps what comes back until its turn.
            waiting = jnp.concatenate([waiting[1:], arrived[None]])
            entering = jnp.where(turn == 0, entering, waiting[0])
        here = jnp.where(stage == 0, entering, arrived)
        # Zeros where there is nothing: a stage in the bubble must make no NaN, whose gradient would not be zero.
        here = jnp.where(valid, here, jnp.zeros((), x.dtype))
        out, stats = run(here, number, turn)
        totals = jax.tree.map(
            lambda total, one: total.at[turn].add(jnp.where(valid, one, jnp.zeros((), one.dtype))), totals, stats
        )
        passed = lax.ppermute(out, "stage", [(s, (s + 1) % stages) for s in range(stages)])
        return (passed, waiting, totals), out

    first = jax.eval_shape(run, x[0], jnp.int32(0), jnp.int32(0))[1]
    totals = jax.tree.map(lambda one: jnp.zeros((rounds, *one.shape), one.dtype), first)
    empty = jnp.zeros((wait + 1, *x.shape[1:]), x.dtype)
    (_, _, totals), outs = lax.scan(
        tick, (jnp.zeros_like(x[0]), empty, totals), jnp.arange(items + stages - 1, dtype=jnp.int32)
    )
    # The last stage finishes the last round's items in the last M ticks.
    return jnp.where(stage == stages - 1, outs[-microbatches:], jnp.zeros((), x.dtype)), totals
