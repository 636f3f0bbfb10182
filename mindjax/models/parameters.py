"""How a parameter is declared: an `nnx.Param` with its logical axes, from which `sharding.rules` lays it out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# A key of our own: flax's `sharding_names` wants a mesh at construction, and parameters know no mesh.
LOGICAL_AXES = "logical_axes"


class Init:
    """Draws parameters one after another from one key, in one dtype.

    Args:
      key: the root PRNG key.
      dtype: of every parameter.
      scale: standard deviation of weight matrices and tables.
    """

    def __init__(self, key: jax.Array, dtype: jnp.dtype, scale: float):
        self._rngs, self._dtype, self._scale = nnx.Rngs(key), dtype, scale

    def normal(self, *dims: tuple[str, int]) -> nnx.Param:
        """A weight drawn from N(0, scale^2); `dims` are (logical axis, size) pairs."""
        names, shape = zip(*dims, strict=True)
        # Drawn in float32, so that a bf16 model starts as the rounded float32 model.
        value = self._scale * jax.random.normal(self._rngs.params(), shape, jnp.float32)
        return nnx.Param(value.astype(self._dtype), **{LOGICAL_AXES: names})

    def constant(self, value: float, *dims: tuple[str, int]) -> nnx.Param:
        """A norm scale (1) or a bias (0)."""
        names, shape = zip(*dims, strict=True)
        return nnx.Param(jnp.full(shape, value, self._dtype), **{LOGICAL_AXES: names})


def pure_dict(module: nnx.Module) -> dict[str, Any]:
    """The parameters of a module as the nested dict of arrays that every pure function here takes."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def map_parameters(module: nnx.Module, function: Any) -> dict[str, Any]:
    """The same nested dict with `function(nnx.Param)` at the leaves."""
    state = nnx.state(module, nnx.Param)
    return nnx.to_pure_dict(
        jax.tree.map(function, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)),
        extract_fn=lambda leaf: leaf,
    )
