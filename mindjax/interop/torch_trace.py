"""transformers' Qwen3-VL, watched from outside by hooks: the other side of `layerwise`, with the same names."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from mindjax.config import ModelConfig
from mindjax.interop.layerwise import Trace
from mindjax.interop.torch_exchange import to_torch
from mindjax.ops.quantize import FORMATS, Quantized

# transformers' name of a quantised projection of ours, inside one text layer.
PROJECTIONS = {
    **{f"attn.{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"mlp.{x}": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    "moe.gate_up": "mlp.experts.gate_up_proj",
    "moe.down": "mlp.experts.down_proj",
}


def load(folder: Path, config: ModelConfig) -> PreTrainedModel:
    """The model in float32 with torch's own attention and a plain loop over experts."""
    cls = Qwen3VLMoeForConditionalGeneration if config.text.num_experts else Qwen3VLForConditionalGeneration
    experts = {"experts_implementation": "eager"} if config.text.num_experts else {}
    return cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", **experts).eval()


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of the model, weights rounded to `dtype`."""
    return copy.deepcopy(model).to(dtype)


def with_weights(model: PreTrainedModel, quantized: Mapping[str, Quantized]) -> PreTrainedModel:
    """A copy of the model whose projections hold value * scale, multiplied out by torch in float32.

    Args:
      quantized: name in PROJECTIONS -> its quantised matrices, stacked over layers, [layers, (experts,) outputs, K].
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, q in quantized.items():
            weights = dequantize(q)
            for layer, weight in zip(model.model.language_model.layers, weights, strict=True):
                layer.get_parameter(PROJECTIONS[name]).copy_(weight)
    return model


def dequantize(q: Quantized) -> torch.Tensor:
    """float32 value * scale by torch alone, the counterpart of `ops.quantize.dequantize`."""
    values, scales = to_torch((q.values, q.scales))
    rows, columns = (size or whole for size, whole in zip(FORMATS[q.format].block, values.shape[-2:], strict=True))
    scales = scales.repeat_interleave(rows, -2)[..., : values.shape[-2], :]
    return values.float() * scales.repeat_interleave(columns, -1)[..., : values.shape[-1]]


def trace(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], given: Trace | None = None) -> Trace:
    """One forward pass with what every operation read and gave; see `layerwise.Trace`.

    Args:
      inputs: of the model, right-padded, with attention_mask.
      given: each operation reads this trace's inputs instead, so that its output is right or wrong by itself.
    """
    out, real = Trace(), inputs["attention_mask"].bool()
    dtype, device = model.dtype, model.device

    def flat(tensor: torch.Tensor) -> np.ndarray:
        tensor = tensor.detach()
        tensor = tensor[real.to(tensor.device)] if tensor.ndim == 3 else tensor
        return tensor.to(torch.float64 if dtype == torch.float64 else torch.float32).cpu().numpy()

    def unflat(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        new = torch.as_tensor(values, dtype=dtype, device=device)
        if like.ndim == 3:
            whole = torch.zeros_like(like)
            whole[real.to(device)] = new
            return whole
        return new.reshape(like.shape)

    def on_input(name: str, hidden: str | None) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0]
            if hidden is not None:
                out.outputs[hidden] = flat(x)
            if name:
                x = x if given is None else unflat(given.inputs[name], x)
                out.inputs[name] = flat(x)
            return (x, *args[1:]), kwargs

        return hook

    def on_output(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            out.outputs[name] = flat(output[0] if isinstance(output, tuple) else output)

        return hook

    def on_router(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            out.choices[layer] = output[2].detach().reshape(*real.shape, -1)[real].cpu().numpy()

        return hook

    with ExitStack() as stack:
        for name, reads, gives, hidden in _operations(model):
            handle = reads.register_forward_pre_hook(on_input(name, hidden), with_kwargs=True)
            stack.callback(handle.remove)
            if gives is not None:
                stack.callback(gives.register_forward_hook(on_output(name)).remove)
        for i, layer in enumerate(model.model.language_model.layers):
            if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts"):
                stack.callback(layer.mlp.gate.register_forward_hook(on_router(i)).remove)
        with torch.no_grad():
            model(**{
                key: value.to(device, dtype) if value.is_floating_point() else value.to(device)
                for key, value in inputs.items() if key != "labels"
            }, use_cache=False)  # fmt: skip
    return out


def _operations(model: PreTrainedModel) -> Iterator[tuple[str, Any, Any, str | None]]:
    """(name, module that reads its input, module that gives its output, what the stream is called at that place)."""
    visual, language = model.model.visual, model.model.language_model
    before = "vision.embed"
    for i, block in enumerate(visual.blocks):
        yield f"vision.{i}.attention", block.norm1, block.attn, before
        yield f"vision.{i}.mlp", block.norm2, block.mlp, None
        before = f"vision.{i}.hidden"
    indexes = list(visual.deepstack_visual_indexes)
    for place, merger in enumerate(visual.deepstack_merger_list):
        yield f"vision.deepstack.{sorted(indexes).index(indexes[place])}", merger, merger, None
    yield "vision.merger", visual.merger, visual.merger, before
    before = "text.embed"
    for i, layer in enumerate(language.layers):
        yield f"text.{i}.attention", layer.input_layernorm, layer.self_attn, before
        yield f"text.{i}.mlp", layer.post_attention_layernorm, layer.mlp, None
        before = f"text.{i}.hidden"
    yield "head", language.norm, model.lm_head, before


def quantized_product(x: np.ndarray, w: np.ndarray, formats: tuple[str, str]) -> np.ndarray:
    """x [rows, K] by w [outputs, K] transposed, both quantised by torch, multiplied in float64: [rows, outputs]."""
    parts = [_quantized(torch.tensor(a), format) for a, format in zip((x, w), formats, strict=True)]
    return (parts[0] @ parts[1].T).numpy()


def _quantized(x: torch.Tensor, format: str) -> torch.Tensor:
    """What x [rows, K] is after quantising, float64: blocks of max |x| / largest, nearest even, clipped."""
    how = FORMATS[format]
    out = torch.empty(x.shape, dtype=torch.float64)
    step = [size or whole for size, whole in zip(how.block, x.shape, strict=True)]
    to = {"int8": None, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}[
        np.dtype(how.dtype).name
    ]
    for row in range(0, x.shape[0], step[0]):
        for column in range(0, x.shape[1], step[1]):
            part = (slice(row, row + step[0]), slice(column, column + step[1]))
            scale = x[part].abs().max() / how.largest
            scale = torch.where(scale == 0, torch.ones(()), scale)
            values = (x[part] / scale).clamp(-how.largest, how.largest)
            values = values.round() if to is None else values.to(to)
            out[part] = values.double() * scale.double()
    return out
