"""Small models for test_vllm_rollout; run by it, an engine whose worker is starting, in a process to be killed."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.config import ModelConfig, TextConfig, VisionConfig
from mindjax.data.images import ImageProcessor
from mindjax.data.processor import Processor
from mindjax.data.tokenizer import train_tokenizer
from mindjax.data.video import VideoProcessor
from mindjax.interop.vllm_rollout import VLLMEngine
from mindjax.models import qwen3_vl

TEXTS = ["What do you see in the picture? A digit: seven.", "Compare the two pictures.", "Say something."]


def make_processor() -> Processor:
    tokenizer = train_tokenizer(TEXTS, 300)
    image = ImageProcessor(patch_size=8, min_pixels=32 * 32, max_pixels=128 * 128)
    return Processor(tokenizer, image, VideoProcessor(patch_size=8), tokenizer.chat_template)


def make_config(processor: Processor, *, moe: bool) -> ModelConfig:
    """head_dim 64: the least that vLLM's CPU attention runs. The dense model is tied, the mixture is not."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48} if moe else {}
    return ModelConfig(
        TextConfig(len(processor.tokenizer), 128, 192, 2, 4, 2, 64, (12, 10, 10), 10_000.0, **experts),
        VisionConfig(2, 64, 96, 2, 128, (0,), num_position_embeddings=36, patch_size=8),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=not moe,
    )


def make_params(config: ModelConfig, seed: int, embedding: float = 0.1) -> dict[str, Any]:
    """Weights that matter: products of scale 1, norms and biases random too. A large embedding repeats itself."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        x = rng.standard_normal(leaf.shape).astype(np.float32)
        if "bias" in name or "norm" in name:
            return jnp.asarray(0.2 * x + (0.0 if "bias" in name else 1.0))
        return jnp.asarray(x * (embedding if name.endswith("['embed']") else leaf.shape[-2] ** -0.5))

    return jax.tree_util.tree_map_with_path(draw, qwen3_vl.abstract_params(config))


def make_engine(config: ModelConfig, processor: Processor, params: Any, **options: Any) -> VLLMEngine:
    # One thread each: two threads that wait for each other on busy cores are slower.
    return VLLMEngine(
        config, processor, params, max_length=512, max_rows=16, environments=[{"OMP_NUM_THREADS": "1"}] * 2, **options
    )


if __name__ == "__main__":
    processor = make_processor()
    config = make_config(processor, moe=False)
    engine = make_engine(config, processor, make_params(config, 0))
    print(*engine.pids, *engine._removed, flush=True)
    time.sleep(600)
