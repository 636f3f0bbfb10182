"""The same random rows as inputs of transformers' models and as our `Batch`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from mindjax.config import ModelConfig, TextConfig, VisionConfig
from mindjax.interop.random_checkpoint import random_model as transformers_model
from mindjax.models import hf_weights
from mindjax.types import Batch, VisionInputs

__all__ = ["DENSE", "MOE", "build", "load_gradients", "relative_errors", "transformers_model"]

# What stands in a row: a number of text tokens, ("image", h, w) or ("video", frames, h, w), grids in patches.
Piece = int | tuple[str, int, int] | tuple[str, int, int, int]

DENSE = ModelConfig(
    text=TextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mrope_section=(6, 5, 5),
        rope_theta=10_000.0,
    ),
    vision=VisionConfig(
        depth=4,
        hidden_size=48,
        intermediate_size=80,
        num_heads=4,
        out_hidden_size=64,
        deepstack_visual_indexes=(0, 2),
        num_position_embeddings=36,
        patch_size=4,
    ),
    image_token_id=250,
    video_token_id=251,
    vision_start_token_id=252,
    vision_end_token_id=253,
)
MOE = replace(
    DENSE,
    text=replace(DENSE.text, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=40),
    tie_word_embeddings=True,
)


def with_text(config: ModelConfig, **changes: Any) -> ModelConfig:
    return replace(config, text=replace(config.text, **changes))


def with_vision(config: ModelConfig, **changes: Any) -> ModelConfig:
    return replace(config, vision=replace(config.vision, **changes))


def load_gradients(model: PreTrainedModel, config: ModelConfig, folder: Path) -> dict[str, Any]:
    """The gradients that torch holds, in our layout: written as a checkpoint of the same names and read as one."""
    folder.mkdir(parents=True, exist_ok=True)
    gradients = {
        name: (parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(gradients, folder / "model.safetensors")
    return hf_weights.load(
        folder, config, dtype=jnp.float32, layout="transformers" if config.text.num_experts else None
    )


@dataclass(frozen=True)
class Rows:
    """The same rows twice.

    Attributes:
      inputs: keyword arguments of the transformers model.
      batch: ours, with padding on the same side.
    """

    inputs: dict[str, torch.Tensor]
    batch: Batch


def build(model: PreTrainedModel, config: ModelConfig, rows: list[list[Piece]], *, seed: int = 0) -> Rows:
    """Random tokens and pixels for each row, left-padded to the longest; patches packed into vision rows."""
    rng = np.random.default_rng(seed)
    vision, merge = config.vision, config.vision.spatial_merge_size
    pixels: dict[str, list[np.ndarray]] = {"image": [], "video": []}
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
    all_tokens: list[list[int]] = []
    all_types: list[list[int]] = []
    # One entry per attention segment, in token order: its patches and its grid.
    frames: list[tuple[np.ndarray, int, int]] = []

    for row in rows:
        tokens: list[int] = []
        types: list[int] = []
        for piece in row:
            if isinstance(piece, int):
                tokens += rng.integers(0, 250, piece).tolist()
                types += [0] * piece
                continue
            kind, count, height, width = piece if len(piece) == 4 else (piece[0], 1, *piece[1:])
            patches = rng.normal(size=(count, height * width, vision.patch_dim)).astype(np.float32)
            pixels[kind].append(patches.reshape(-1, vision.patch_dim))
            grids[kind].append((count, height, width))
            pad = config.image_token_id if kind == "image" else config.video_token_id
            for frame in patches:
                frames.append((frame, height, width))
                places = height * width // merge**2
                stamp = rng.integers(0, 250, 3).tolist() if kind == "video" else []
                tokens += [*stamp, config.vision_start_token_id, *[pad] * places, config.vision_end_token_id]
                types += [0] * (len(stamp) + 1) + [1 if kind == "image" else 2] * places + [0]
        all_tokens.append(tokens)
        all_types.append(types)

    length = max(map(len, all_tokens))
    pad_left = [length - len(tokens) for tokens in all_tokens]
    tokens = np.array([[0] * n + row for n, row in zip(pad_left, all_tokens, strict=True)])
    types = np.array([[0] * n + row for n, row in zip(pad_left, all_types, strict=True)])
    mask = np.array([[0] * n + [1] * (length - n) for n in pad_left])
    inputs = {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(mask),
        "mm_token_type_ids": torch.tensor(types, dtype=torch.int32),
    }
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if pixels[kind]:
            inputs[f"pixel_values{suffix}"] = torch.tensor(np.concatenate(pixels[kind]))
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
    positions, _ = model.model.get_rope_index(**{k: v for k, v in inputs.items() if not k.startswith("pixel")})
    vision_index = np.where(types > 0, np.cumsum(types.reshape(-1) > 0).reshape(types.shape) - 1, -1)
    packed, slots = _pack_frames(frames, vision)
    batch = Batch(
        tokens=jnp.asarray(tokens, jnp.int32),
        positions=jnp.asarray(positions.numpy().transpose(1, 2, 0), jnp.int32),
        segment_ids=jnp.asarray(mask, jnp.int32),
        loss_mask=jnp.asarray(mask, jnp.float32),
        vision_index=jnp.asarray(
            np.where(vision_index >= 0, slots[vision_index], -1) if frames else vision_index, jnp.int32
        ),
        vision=packed,
    )
    return Rows(inputs, batch)


def _pack_frames(
    frames: list[tuple[np.ndarray, int, int]], vision: VisionConfig
) -> tuple[VisionInputs | None, np.ndarray]:
    """Frames two to a row, with garbage between them; where each merged token ended up."""
    if not frames:
        return None, np.zeros(0, np.int32)
    merge, unit = vision.spatial_merge_size, vision.merge_unit
    longest = max(len(patches) for patches, _, _ in frames)
    length = 2 * longest + unit
    rows = (len(frames) + 1) // 2
    patches = np.full((rows, length, vision.patch_dim), 7.0, np.float32)
    coordinates = np.zeros((rows, length, 4), np.int32)
    segments = np.zeros((rows, length), np.int32)
    slots: list[int] = []
    for number, (frame, height, width) in enumerate(frames):
        row, start = divmod(number, 2)
        start = start * (longest + unit)
        place = slice(start, start + len(frame))
        grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
        grid = grid.reshape(height // merge, merge, width // merge, merge, 2).swapaxes(1, 2).reshape(-1, 2)
        patches[row, place] = frame
        coordinates[row, place, :2] = grid
        coordinates[row, place, 2:] = (height, width)
        segments[row, place] = number + 1
        slots += ((row * length + start) // unit + np.arange(len(frame) // unit)).tolist()
    return VisionInputs(jnp.asarray(patches), jnp.asarray(coordinates), jnp.asarray(segments)), np.array(slots)


def relative_errors(ours: Any, theirs: Any) -> dict[str, float]:
    """||difference|| / ||reference|| of every leaf, by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(ours)
    reference = jax.tree.leaves(theirs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    return {
        jax.tree_util.keystr(path): float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))
        for (path, a), b in zip(flat, reference, strict=True)
    }
