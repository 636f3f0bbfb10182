"""The smallest model and data that every training test shares: two layers, 32 wide, seconds to compile."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.config import ModelConfig, TextConfig, VisionConfig
from mindjax.data.packing import BatchShape
from mindjax.data.render import Rendered
from mindjax.models import qwen3_vl

VOCABULARY, IMAGE_TOKEN = 64, 60


def model(**experts: Any) -> ModelConfig:
    return ModelConfig(
        text=TextConfig(VOCABULARY, 32, 48, 2, 2, 1, 16, (4, 2, 2), rope_theta=10_000.0, **experts),
        vision=VisionConfig(1, 16, 24, 2, 32, (0,), num_position_embeddings=16, patch_size=4),
        image_token_id=IMAGE_TOKEN,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )


def moe_model() -> ModelConfig:
    return model(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


SHAPE = BatchShape(rows=2, length=32, vision_rows=4, vision_length=16, patch_dim=96)


@lru_cache
def init(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Parameters drawn by NumPy, which compiles nothing; the same object each time, so leave its dicts alone."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = "/".join(str(key.key) for key in path)
        centre = 1.0 if "norm" in name and not name.endswith("bias") else 0.0
        return jnp.array(centre + rng.normal(0, 0.1, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, qwen3_vl.abstract_params(config))


def sample(rng: np.random.Generator, tokens: int, images: tuple[tuple[int, int], ...] = ()) -> Rendered:
    """A conversation of random words, with images of the given grids near its start; its second half is targets."""
    places = [height * width // 4 for height, width in images]
    assert tokens > sum(places) + 1
    modality = np.zeros(tokens, np.int8)
    modality[1 : 1 + sum(places)] = 1
    words = rng.integers(0, IMAGE_TOKEN, tokens)
    mask = (np.arange(tokens) >= max(tokens // 2, 1 + sum(places))).astype(np.float32)
    return Rendered(
        tokens=np.where(modality > 0, IMAGE_TOKEN, words).astype(np.int32),
        loss_mask=mask,
        positions=np.repeat(np.arange(tokens, dtype=np.int32)[:, None], 3, axis=1),
        modality=modality,
        frames=tuple((rng.normal(size=(h * w, 96)).astype(np.float32), (h, w)) for h, w in images),
        next_position=tokens,
    )


def samples(count: int, seed: int = 0, longest: int = 24) -> list[Rendered]:
    """Text and images in turn, of different lengths."""
    rng = np.random.default_rng(seed)
    grids: list[tuple[tuple[int, int], ...]] = [(), ((2, 4),), ((4, 4),), ((2, 2), (2, 4))]
    return [sample(rng, int(rng.integers(8, longest + 1)), grids[i % len(grids)]) for i in range(count)]
