"""What a training step takes and gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mindjax.train.optimizer import OptimizerConfig, make_optimizer, multipliers, split_trainable

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      params: all parameters. Trainable ones are float32 masters: an update is often below the spacing of bfloat16
        at the weight (1e-5 against 2^-8 of it) and would round away, so the step casts a copy to the compute dtype.
        Frozen ones keep the dtype they came in, for no update is lost on them.
      opt_state: float32, of the trainable parameters alone.
      step: scalar int32, updates made.
      key: the root of every random draw of the run; a draw folds in what it is for (step, prompt, sample), so the
        same seed repeats and no two draws share a key by accident.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array

    @classmethod
    def create(cls, params: Params, config: OptimizerConfig, key: jax.Array) -> TrainState:
        """A fresh state. It owns copies: the step donates its buffers, and the caller keeps theirs."""
        factors = multipliers(config, params)

        def own(leaf: jax.Array, factor: float) -> jax.Array:
            return jnp.array(leaf, dtype=jnp.float32 if factor > 0 else leaf.dtype, copy=True)

        params = jax.tree.map(own, params, factors)
        optimizer = make_optimizer(config, params)
        trainable, _ = split_trainable(params, factors)
        opt_state = jax.jit(optimizer.init)(trainable)
        state = cls(params, opt_state, jnp.zeros((), jnp.int32), jnp.array(key, copy=True))
        # Committed to its devices, as a restored state is: JAX compiles once for each of the two kinds.
        return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))
