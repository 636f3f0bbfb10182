"""Weights of 8 bits for rollouts: a tree of parameters that the sampler, and any forward pass, takes as it is.

Quantised are the products of the language model's layers: q, k, v, o, gate, up, down, and all experts. Their rows of
activations are quantised when they meet such a weight, each by itself, so that an answer does not depend on its batch.

| kind | weights, a scale per | activations, a scale per | sums |
|---|---|---|---|
| int8 | output | token | int32, exact, then float32 |
| fp8 (e4m3) | 128 x 128 | 128 of a token | float32 over 128, these in float32 |

Everything else stays: the embedding and the output head, whose error would go straight into the log-probabilities; the
router, where small differences choose the expert; norms; the vision encoder, whose features the trainer reads too. So
do keys, values and attention. Results of products have the dtype of the embedding. Formats, rounding and products are
those of `mindjax.ops.quantize`: on CPU and CUDA the kernels of `kernels_cuda` and XLA's int8 product, elsewhere `jnp`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import jax
from jax import lax

from mindjax.config import ModelConfig
from mindjax.models.qwen3_vl import Params
from mindjax.ops.quantize import Quantized, quantize

Kind = Literal["int8", "fp8"]

FORMATS = {"int8": "int8_row", "fp8": "e4m3_128x128"}
_PRODUCTS = {"attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down"), "moe": ("gate_up", "down")}


def quantize_params(params: Params, config: ModelConfig, kind: Kind) -> Params:
    """The parameters with the matrices of their layers in 8 bits, [..., outputs, inputs]; the rest is shared.

    Args:
      params: of `mindjax.models.qwen3_vl`, float32 or bfloat16.
      config: of the model.
      kind: "int8" or "fp8".

    Raises:
      ValueError: another kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"weights of 8 bits are {' or '.join(get_args(Kind))}, not {kind!r}")
    layers: dict[str, Any] = dict(params["text"]["layers"])
    for part in ("attn", "moe" if config.text.num_experts else "mlp"):
        names = _PRODUCTS[part]
        quantised = {name: _quantize(layers[part][name], FORMATS[kind]) for name in names}
        layers[part] = {**layers[part], **quantised}
    return {**params, "text": {**params["text"], "layers": layers}}


@partial(jax.jit, static_argnames="format")
def _quantize(stack: jax.Array, format: str) -> Quantized:
    """[layers, ..., inputs, outputs], a layer at a time: what quantising needs beside it is of one layer's size."""
    return lax.map(lambda layer: quantize(layer.swapaxes(-1, -2), format), stack)
