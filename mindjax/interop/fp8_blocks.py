"""Checkpoints in the block-fp8 layout that DeepSeek and Qwen publish and that vLLM and transformers load.

A quantised matrix `w` is e4m3, and `w` + "_scale_inv" holds one float32 per 128 x 128 block: the number is value times
scale (`inv`, as it is the inverse of what the weight was multiplied by). `...q_proj.weight` [outputs, inputs] has
`...q_proj.weight_scale_inv` [ceil(outputs / 128), ceil(inputs / 128)]. The experts of a layer stay one tensor, as in
Qwen's published Qwen3-VL-MoE files: `experts.gate_up_proj` [E, H, 2I] with `experts.gate_up_proj_scale_inv`
[E, ceil(H / 128), ceil(2I / 128)], and `experts.down_proj` [E, I, H] alike. Projections of the text layers are
quantised; the vision tower, routers, norms, embedding and head are not, and config.json lists those of them that are
matrices. vLLM wants text dimensions that are multiples of 128; transformers 5.19 loads dense models, of a mixture it
drops the experts' scales.

Values and scales are those of `mindjax.ops.quantize`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mindjax.models.hf_weights import copy_companions, refuse_foreign, with_dtype
from mindjax.models.safetensors_io import (
    DTYPES,
    QUANTISED_DTYPES,
    Reader,
    TensorSpec,
    read_json,
    replaced_folder,
    write,
    write_json,
)
from mindjax.ops.quantize import Quantized, dequantize, quantize

BLOCK = 128
SCALE = "_scale_inv"
_FORMAT = "e4m3_128x128"
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_SHARD_BYTES = 5 * 10**9
_PART = 2**22  # numbers quantised at a time
_PROJECTION = re.compile(
    r"model\.language_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj\.weight|mlp\.(gate|up|down)_proj\.weight|mlp\.experts\.(gate_up|down)_proj)"
)

_quantize = jax.jit(partial(quantize, format=_FORMAT))
_dequantize = jax.jit(dequantize, static_argnames="dtype")


def is_quantised(key: str) -> bool:
    """Whether the published key is of a matrix that this layout quantises."""
    return _PROJECTION.fullmatch(key) is not None


def to_blocks(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight [..., rows, columns] of any float dtype as e4m3 values of its shape, and scales per 128 x 128."""
    values, scales = np.empty(w.shape, _E4M3), np.empty(_scales_shape(w.shape), np.float32)
    for part, blocks in _parts(w.shape):
        source = np.asarray(w[part])
        quantised = _quantize(source if source.dtype == ml_dtypes.bfloat16 else source.astype(np.float32))
        values[part], scales[blocks] = quantised.values, quantised.scales
    return values, scales


def from_blocks(values: np.ndarray, scales: np.ndarray, dtype: Any) -> np.ndarray:
    """The weight that values and scales stand for, rounded to `dtype`; the inverse of `to_blocks`.

    Raises:
      ValueError: where the scales are not one per 128 x 128.
    """
    if scales.shape != _scales_shape(values.shape):
        raise ValueError(
            f"values {list(values.shape)} have scales {list(scales.shape)}; in blocks of {BLOCK} they are "
            f"{list(_scales_shape(values.shape))}"
        )
    w = np.empty(values.shape, dtype)
    for part, blocks in _parts(values.shape):
        w[part] = _dequantize(Quantized(jnp.asarray(values[part]), jnp.asarray(scales[blocks]), _FORMAT), dtype=dtype)
    return w


def export(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, max_shard_bytes: int = _SHARD_BYTES
) -> None:
    """Rewrites a checkpoint folder with published expert layout in fp8 blocks, a tensor at a time.

    Raises:
      ValueError: for a folder that is quantised already, or whose experts have the layout of transformers.
      OSError: where the disk is full; `target` is then as it was.
    """
    source, target = Path(source), Path(target)
    hf_config, reader = read_json(source / "config.json"), Reader(source)
    _check_layout(reader, hf_config)
    specs: list[TensorSpec] = []
    for key, spec in reader.specs.items():
        if is_quantised(key):
            scales = TensorSpec(key + SCALE, np.dtype(np.float32), _scales_shape(spec.shape))
            specs += [TensorSpec(key, _E4M3, spec.shape), scales]
        else:
            specs.append(spec)
    if not any(spec.dtype == _E4M3 for spec in specs):
        raise ValueError(f"{source} has no projections of text layers to quantise; is it a published Qwen3-VL folder?")
    left = [key for key, spec in reader.specs.items() if key.endswith(".weight") and len(spec.shape) > 1]
    skipped = sorted({"lm_head", *(key.removesuffix(".weight") for key in left if not is_quantised(key))})
    hf_config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": skipped,
    }
    scales_of: dict[str, np.ndarray] = {}  # those of the matrix written last

    def tensor(spec: TensorSpec) -> np.ndarray:
        if spec.name in scales_of:
            return scales_of.pop(spec.name)
        view = reader.view(spec.name)
        if not is_quantised(spec.name):
            return view
        values, scales_of[spec.name + SCALE] = to_blocks(view)
        return values

    _write_folder(source, target, specs, tensor, hf_config, max_shard_bytes)


def restore(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: Any = "bfloat16",
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Rewrites a block-fp8 folder with plain weights in `dtype`, a tensor at a time; the inverse of `export`.

    Raises:
      ValueError: for a folder that is not in 128 x 128 blocks of fp8, and for values without their scales or scales
        without their values.
      OSError: where the disk is full; `target` is then as it was.
    """
    source, target, dtype = Path(source), Path(target), jnp.dtype(dtype)
    hf_config = read_json(source / "config.json")
    if not is_block_fp8(source):
        found = hf_config.get("quantization_config")
        raise ValueError(f"{source}: quantization_config is {found}; this reads fp8 in blocks of [{BLOCK}, {BLOCK}]")
    reader = Reader(source, DTYPES | QUANTISED_DTYPES)
    scaled = {key for key in reader.specs if key + SCALE in reader.specs}
    scales = {key + SCALE for key in scaled}
    lone = [key for key in reader.specs if key.endswith(SCALE) and key not in scales]
    lone += [key for key, spec in reader.specs.items() if (spec.dtype == _E4M3) != (key in scaled)]
    if lone:
        raise ValueError(f"{source}: values without scales, or scales without values: {', '.join(sorted(lone)[:5])}")
    specs = [TensorSpec(key, dtype, spec.shape) for key, spec in reader.specs.items() if key not in scales]

    def tensor(spec: TensorSpec) -> np.ndarray:
        view = reader.view(spec.name)
        return from_blocks(view, reader.view(spec.name + SCALE), dtype) if spec.name in scaled else view

    del hf_config["quantization_config"]
    _write_folder(source, target, specs, tensor, with_dtype(hf_config, dtype), max_shard_bytes)


def is_block_fp8(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder's config.json is of one that `restore` reads."""
    path = Path(folder) / "config.json"
    quantisation = (read_json(path) if path.is_file() else {}).get("quantization_config") or {}
    return quantisation.get("quant_method") == "fp8" and quantisation.get("weight_block_size") == [BLOCK, BLOCK]


def _write_folder(
    source: Path,
    target: Path,
    specs: list[TensorSpec],
    tensor: Callable[[TensorSpec], np.ndarray],
    hf_config: dict[str, Any],
    max_shard_bytes: int,
) -> None:
    if source.resolve() == target.resolve():
        raise ValueError(f"source and target are both {source}; give another target")
    refuse_foreign(target)
    with replaced_folder(target, sum(spec.nbytes for spec in specs)) as staging:
        write(staging, specs, tensor, max_shard_bytes)
        copy_companions(source, staging)
        write_json(staging / "config.json", hf_config)


def _check_layout(reader: Reader, hf_config: dict[str, Any]) -> None:
    text = hf_config.get("text_config", {})
    hidden, inner = text.get("hidden_size"), text.get("moe_intermediate_size")
    for key, spec in reader.specs.items():
        if key.endswith("experts.gate_up_proj") and spec.shape[1:] != (hidden, 2 * inner):
            raise ValueError(
                f"{reader.folder}: {key} is {list(spec.shape)}, published files have [experts, {hidden}, {2 * inner}]. "
                f"Write that layout first: mindjax convert {reader.folder} DST --layout published"
            )


# ---- one tensor


def _scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return *shape[:-2], *(-(-size // BLOCK) for size in shape[-2:])


def _parts(shape: tuple[int, ...]) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Indices of what is quantised at once, strips of whole blocks, and of their scales."""
    strip = max(1, _PART // (shape[-1] * BLOCK))  # rows of blocks
    for index in np.ndindex(shape[:-2]):
        for row in range(0, _scales_shape(shape)[-2], strip):
            yield (*index, slice(row * BLOCK, (row + strip) * BLOCK)), (*index, slice(row, row + strip))
