"""The 8-bit part of a parity report: quantised projections on both sides, and their products one by one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_cuda import jax_binding
from mindjax.interop import torch_trace
from mindjax.interop.layerwise import Trace
from mindjax.interop.parity_rows import CALC_DIFF, TIER_1, TIER_2, Bound, Row, calc_diff, relative
from mindjax.ops.quantize import FORMATS, Quantized, dequantize, quantize, quantized_matmul

if TYPE_CHECKING:
    from mindjax.interop.parity import Case

# Formats of (activations, weights).
EIGHT_BITS = {"int8": ("int8_row", "int8_row"), "fp8": ("e4m3_1x128", "e4m3_128x128")}
Params = dict[str, Any]
_quantize = jax.jit(quantize, static_argnums=1)


def quantize_projections(params: Params, format: str) -> dict[str, Quantized]:
    """Every projection of the language model, [layers, (experts,) outputs, K], by its name in a layer."""
    layers = params["text"]["layers"]
    names = [name for name in torch_trace.PROJECTIONS if name.split(".")[0] in layers]
    return {name: _quantize(_leaf(layers, name).swapaxes(-1, -2), format) for name in names}


def with_weights(params: Params, quantized: Mapping[str, Quantized]) -> Params:
    """The parameters with value * scale in place of the projections, float32."""
    layers = {key: dict(value) if isinstance(value, dict) else value for key, value in params["text"]["layers"].items()}
    for name, q in quantized.items():
        branch, leaf = name.split(".")
        layers[branch][leaf] = dequantize(q).swapaxes(-1, -2)
    return {**params, "text": {**params["text"], "layers": layers}}


def _leaf(layers: Params, name: str) -> jax.Array:
    branch, leaf = name.split(".")
    return layers[branch][leaf]


def products(case: Case, trace: Trace, dtype: str) -> list[Row]:
    """The products that read the stream, activations and weights quantised, by us and by torch from the start.

    An expert's product has the rows that chose it. "kernel" is the grouped product of all experts at once, where the
    device's library is built.

    Args:
      trace: of transformers; its streams are what is multiplied.
      dtype: one of EIGHT_BITS.
    """
    formats, layers, rows = EIGHT_BITS[dtype], case.params["text"]["layers"], []
    for i in range(case.config.text.num_hidden_layers):
        for name in torch_trace.PROJECTIONS:
            branch, leaf = name.split(".")
            if branch not in layers or leaf in ("o", "down"):
                continue  # these read what stands inside an operation
            norm = "input_norm" if branch == "attn" else "post_attention_norm"
            stream = trace.inputs[f"text.{i}.{'attention' if branch == 'attn' else 'mlp'}"].astype(np.float32)
            x = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + case.config.text.rms_norm_eps)
            x = np.asarray(jnp.asarray(x * np.asarray(layers[norm][i]), jnp.bfloat16).astype(jnp.float32))
            w = np.asarray(_leaf(layers, name)[i].swapaxes(-1, -2), np.float32)
            # Which rows meet which matrix.
            groups = [(np.arange(len(x)), w)] if w.ndim == 2 else _by_expert(w, trace.choices[i])
            same = [torch_trace.quantized_product(x[rows], w, formats) for rows, w in groups]
            exact = [x[rows].astype(np.float64) @ w.astype(np.float64).T for rows, w in groups]
            # All rows, so that one shape is compiled; each row is quantised by itself.
            ours = {"": [np.asarray(_multiply(jnp.asarray(x), jnp.asarray(w), formats))[rows] for rows, w in groups]}
            if w.ndim == 3 and jax_binding.available(_library()):
                ours[" kernel"] = [_by_kernel(x, groups, formats)]
            for suffix, parts in ours.items():
                rows.append(_product(f"product.{i}.{name}{suffix}", parts, same, exact))
    return rows


def _product(where: str, ours: list[np.ndarray], same: list[np.ndarray], exact: list[np.ndarray]) -> Row:
    a, b, c = (np.concatenate(parts) for parts in (ours, same, exact))
    metrics = {"same_values": relative(a, b), "unquantised": relative(a, c), "calc_diff": calc_diff(a, c)}
    bounds = (
        Bound("same_values", TIER_1, "tier 1"),
        Bound("unquantised", TIER_2, "tier 2"),
        Bound("calc_diff", CALC_DIFF, "tier 2"),
    )
    return Row(where, metrics, bounds)


@partial(jax.jit, static_argnums=2)
def _multiply(x: jax.Array, w: jax.Array, formats: tuple[str, str]) -> jax.Array:
    return quantized_matmul(quantize(x, formats[0]), quantize(w, formats[1]), dtype=jnp.float32)


def _by_kernel(x: np.ndarray, groups: list[tuple[np.ndarray, np.ndarray]], formats: tuple[str, str]) -> np.ndarray:
    """Rows in order of groups, all in one call of the compiled kernel: [sum of rows, outputs] float32."""
    q = _quantize(jnp.asarray(x[np.concatenate([rows for rows, _ in groups])]), formats[0])
    w = _quantize(jnp.asarray(np.stack([matrix for _, matrix in groups])), formats[1])
    sizes = jnp.asarray([len(rows) for rows, _ in groups], jnp.int32)
    if FORMATS[formats[0]].dtype == jnp.int8:
        scales = q.scales[..., 0], w.scales[..., 0]
        return np.asarray(jax_binding.gmm_s8(q.values, scales[0], w.values, scales[1], sizes, dtype=jnp.float32))
    return np.asarray(jax_binding.gmm_fp8(q.values, q.scales, w.values, w.scales, sizes, dtype=jnp.float32))


def _library() -> str:
    """Of the default device."""
    return "cuda" if jnp.zeros(()).devices().pop().platform == "gpu" else "cpu"


def _by_expert(w: np.ndarray, choices: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(numbers of the tokens that chose it, its matrix) of each expert that somebody chose."""
    chosen = [np.nonzero((choices == expert).any(-1))[0] for expert in range(len(w))]
    return [(rows, w[expert]) for expert, rows in enumerate(chosen) if len(rows)]
