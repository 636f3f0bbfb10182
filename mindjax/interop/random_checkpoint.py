"""Random checkpoints that transformers saves: what parity is measured on where no trained model is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    PreTrainedModel,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from mindjax.config import ModelConfig, TextConfig, VisionConfig
from mindjax.data.images import ImageProcessor
from mindjax.data.processor import Processor
from mindjax.data.tokenizer import train_tokenizer
from mindjax.data.video import VideoProcessor

TEXTS = ("What do you see in the picture? A digit: seven.", "Compare the two pictures.", "Say something.")


def random_model(config: ModelConfig, folder: Path, seed: int = 0, *, embedding: float = 0.5) -> PreTrainedModel:
    """A random model of that shape, saved to `folder`: every weight random, norms and biases too.

    Products have scale 1, so that every part of the model matters to its logits.

    Args:
      embedding: scale of the embedding table and of an output matrix of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    moe = config.text.num_experts > 0
    hf_config = AutoConfig.for_model("qwen3_vl_moe" if moe else "qwen3_vl", **{
        key: value for key, value in config.to_hf().items() if key != "model_type"
    })  # fmt: skip
    torch.manual_seed(seed)
    model = (Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration)(hf_config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 16
            scale = embedding if "embed_tokens" in name or "lm_head" in name else fan_in**-0.5
            parameter.copy_(torch.randn_like(parameter) * (0.2 if is_scale else scale) + (1.0 if is_scale else 0.0))
    model.save_pretrained(folder)
    return model


def random_checkpoint(folder: Path, *, moe: bool, seed: int = 0) -> ModelConfig:
    """A small model with tokenizer and processor, which transformers and we can read; vLLM after `mindjax convert`.

    head_dim 64 is the least that vLLM's CPU attention runs. The dense model is tied, the mixture is not.
    """
    tokenizer = train_tokenizer(list(TEXTS), 300)
    image = ImageProcessor(patch_size=8, min_pixels=32 * 32, max_pixels=128 * 128)
    processor = Processor(tokenizer, image, VideoProcessor(patch_size=8), tokenizer.chat_template)
    experts: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48} if moe else {}
    config = ModelConfig(
        TextConfig(len(tokenizer), 128, 192, 4, 4, 2, 64, (12, 10, 10), 10_000.0, **experts),
        VisionConfig(4, 64, 96, 2, 128, (0, 2), num_position_embeddings=36, patch_size=8),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=not moe,
    )
    # A large embedding would make a tied model repeat its last token; so do logits have scale 1.
    random_model(config, folder, seed, embedding=0.1)
    processor.save_pretrained(folder)
    return config
