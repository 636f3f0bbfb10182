"""What a training step takes and gives back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

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
      step: scalar int32, steps whose data has been used; those whose update was left out count.
      key: the root of every random draw of the run; a draw folds in what it is for (step, prompt, sample), so the
        same seed repeats and no two draws share a key by accident.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array

    @classmethod
    def create(
        cls, params: Params, config: OptimizerConfig, key: jax.Array, shardings: Params | None = None
    ) -> TrainState:
        """A fresh state. It owns copies: the step donates its buffers, and the caller keeps theirs.

        Args:
          params: on one device, or where `shardings` puts them.
          config: see `OptimizerConfig`.
          key: see `TrainState`.
          shardings: where the parameters, and the optimizer's numbers of each, are to lie (`qwen3_vl.shardings`); None
            is one device.
        """
        make = partial(_fresh, config)
        if shardings is None:
            state = jax.jit(make)(params, key)
            # Committed to its devices, as a restored state is: JAX compiles once for each of the two kinds.
            return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))
        placed = state_shardings(jax.eval_shape(make, params, key), shardings)
        return jax.jit(make, out_shardings=placed)(jax.device_put(params, shardings), key)

    @classmethod
    def abstract(cls, params: Params, config: OptimizerConfig, shardings: Params) -> TrainState:
        """Shapes, dtypes and places of a state, without memory; `params` are shapes."""
        shapes = jax.eval_shape(partial(_fresh, config), params, jax.random.key(0))
        placed = state_shardings(shapes, shardings)
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, placed)


def _fresh(config: OptimizerConfig, params: Params, key: jax.Array) -> TrainState:
    factors = multipliers(config, params)
    # Copied, for JAX would give the caller's own buffers back.
    params = jax.tree.map(lambda p, f: jnp.copy(p.astype(jnp.float32) if f > 0 else p), params, factors)
    trainable, _ = split_trainable(params, factors)
    opt_state = make_optimizer(config, params).init(trainable)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), jnp.copy(key))


def state_shardings(state: TrainState, params: Params) -> TrainState:
    """Where the leaves of a state lie: the optimizer's with the parameter that they belong to.

    Args:
      state: arrays or shapes.
      params: a `NamedSharding` for every parameter.
    """
    of = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shapes = {jax.tree_util.keystr(path): p.shape for path, p in jax.tree_util.tree_leaves_with_path(state.params)}
    whole = NamedSharding(next(iter(of.values())).mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The moments of a parameter are named as it is, behind the optimizer's own names.
        for start in range(len(path)):
            name = jax.tree_util.keystr(path[start:])
            if name in of and shapes[name] == leaf.shape:
                return of[name]
        return whole

    return jax.tree_util.tree_map_with_path(place, state)
