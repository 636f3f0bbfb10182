"""Random prompts, with images, of a small model without a tokenizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from mindjax.config import ModelConfig
from mindjax.data.positions import positions_from_tokens
from mindjax.data.render import Rendered


def random_prompt(config: ModelConfig, pieces: list[Any], rng: np.random.Generator) -> Rendered:
    """Text lengths and ("image", height, width) grids, in patches, as one prompt without a reply."""
    tokens: list[int] = []
    frames = []
    for piece in pieces:
        if isinstance(piece, int):
            tokens += rng.integers(0, min(250, config.image_token_id), piece).tolist()
            continue
        _, height, width = piece
        frames.append((rng.normal(size=(height * width, config.vision.patch_dim)).astype(np.float32), (height, width)))
        places = height * width // config.vision.merge_unit
        tokens += [config.vision_start_token_id, *[config.image_token_id] * places, config.vision_end_token_id]
    processor: Any = SimpleNamespace(
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        merge_size=config.vision.spatial_merge_size,
    )
    array = np.asarray(tokens, np.int32)
    positions = positions_from_tokens(array, [grid for _, grid in frames], processor)
    return Rendered(
        tokens=array,
        loss_mask=np.zeros(len(array), np.float32),
        positions=positions,
        modality=(array == config.image_token_id).astype(np.int8),
        frames=tuple(frames),
        next_position=int(positions.max()) + 1,
    )
