"""SwiGLU of the dense language model."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mindjax.config import TextConfig
from mindjax.models.parameters import Init
from mindjax.ops.activation import silu_product
from mindjax.ops.matmul import matmul


class MLP(nnx.Module):
    """Projections stacked over layers."""

    def __init__(self, init: Init, config: TextConfig):
        layer, embed = ("layer", config.num_hidden_layers), ("embed", config.hidden_size)
        hidden = ("mlp", config.intermediate_size)
        self.gate = init.normal(layer, embed, hidden)
        self.up = init.normal(layer, embed, hidden)
        self.down = init.normal(layer, hidden, embed)


def mlp(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """down(silu(gate(x)) * up(x)) on x [B, T, H]."""
    gate = checkpoint_name(matmul(x, p["gate"]), "mlp_hidden")
    up = checkpoint_name(matmul(x, p["up"]), "mlp_hidden")
    return matmul(silu_product(gate, up), p["down"])
