"""The parameters of LayerNorm; the operations are in `mindjax.ops.norm`."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from mindjax.models.parameters import Init
from mindjax.ops import norm

# The vision encoder's epsilon is fixed by the published code, not by config.json.
LAYER_NORM_EPS = 1e-6


class LayerNorm(nnx.Module):
    """Scale and bias; `lead` holds stacked leading dimensions."""

    def __init__(self, init: Init, size: int, lead: tuple[tuple[str, int], ...] = ()):
        self.scale = init.constant(1.0, *lead, ("norm", size))
        self.bias = init.constant(0.0, *lead, ("norm", size))


def layer_norm(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """LayerNorm over the last dimension of x [..., H]."""
    return norm.layer_norm(x, p["scale"], p["bias"], LAYER_NORM_EPS)
