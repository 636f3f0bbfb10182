"""Models by name: the published Qwen3-VL shapes, and small ones for a CPU."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mindjax.config import ModelConfig, TextConfig, VisionConfig
from mindjax.models import hf_weights, qwen3_vl
from mindjax.models.safetensors_io import read_json
from sharding.parallel import Parallel


def _vision(out: int, *, so400m: bool) -> VisionConfig:
    """The published encoders: SigLIP-2 Large for 2B and 4B, So400m for the others (arXiv:2511.21631)."""
    if so400m:
        return VisionConfig(27, 1152, 4304, 16, out, (8, 16, 24))
    return VisionConfig(24, 1024, 4096, 16, out, (5, 11, 17))


def _published(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, *, tied: bool = False, **experts: Any
) -> ModelConfig:
    """From config.json of Qwen/Qwen3-VL-*-Instruct; the Thinking models have the same shapes."""
    text = TextConfig(151_936, hidden, intermediate, layers, heads, kv_heads, 128, (24, 20, 20), **experts)
    return ModelConfig(text, _vision(hidden, so400m=not tied), tie_word_embeddings=tied)


def _tiny(**experts: Any) -> ModelConfig:
    """For two CPU cores: seconds to compile, minutes to learn from. 96 x 96 pixels are 36 tokens."""
    return ModelConfig(
        text=TextConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,  # the least that vLLM runs on a CPU
            mrope_section=(12, 10, 10),
            rope_theta=10_000.0,
            max_position_embeddings=8192,
            **experts,
        ),
        vision=VisionConfig(
            depth=4,
            hidden_size=128,
            intermediate_size=256,
            num_heads=4,
            out_hidden_size=128,
            deepstack_visual_indexes=(0, 1, 2),
            num_position_embeddings=256,
            patch_size=8,
        ),
        # As `data.tokenizer.train_tokenizer(texts, 1024)` numbers them: control tokens are the last 20.
        image_token_id=1016,
        video_token_id=1017,
        vision_start_token_id=1013,
        vision_end_token_id=1014,
        tie_word_embeddings=True,
    )


CATALOG: dict[str, ModelConfig] = {
    "qwen3-vl-2b": _published(28, 2048, 6144, 16, 8, tied=True),
    "qwen3-vl-4b": _published(36, 2560, 9728, 32, 8, tied=True),
    "qwen3-vl-8b": _published(36, 4096, 12288, 32, 8),
    "qwen3-vl-32b": _published(64, 5120, 25600, 64, 8),
    "qwen3-vl-30b-a3b": _published(
        48, 2048, 6144, 32, 4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768
    ),
    "qwen3-vl-235b-a22b": _published(
        94, 4096, 12288, 64, 4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536
    ),
    "tiny": _tiny(),
    "tiny-moe": _tiny(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=192),
}


def load(
    path_or_name: str | os.PathLike[str],
    *,
    dtype: Any,
    parallel: Parallel | None = None,
    layout: hf_weights.Layout | None = None,
) -> tuple[ModelConfig, qwen3_vl.Params]:
    """A model folder's config and weights, or a catalog name's with random weights from key 0.

    Args:
      path_or_name: a folder with config.json and safetensors, or a name in `CATALOG`. A folder wins over a name.
      dtype: of the parameters.
      parallel: the devices to place them on; None puts all on the default device.
      layout: of the experts in a folder's files, where their shapes do not tell; see `hf_weights.load`.

    Raises:
      ValueError: where it is neither, or the folder's files are wrong.
    """
    path = Path(path_or_name)
    if path.is_dir():
        config = ModelConfig.from_hf(read_json(path / "config.json"))
        return config, hf_weights.load(path, config, dtype=dtype, parallel=parallel, layout=layout)
    name = str(path_or_name)
    if name not in CATALOG:
        near = difflib.get_close_matches(name.lower(), CATALOG, 1)
        raise ValueError(
            f"{name!r} is neither a folder nor a model name"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" The names are {', '.join(CATALOG)}."
        )
    config = CATALOG[name]
    # Under jit with shardings, no device ever holds more than its part.
    placed = None if parallel is None else qwen3_vl.shardings(config, parallel)
    init = jax.jit(lambda key: qwen3_vl.init(config, key, jnp.dtype(dtype)), out_shardings=placed)
    return config, init(jax.random.key(0))
