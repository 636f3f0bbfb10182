"""config.json as published, as transformers writes it, and as we write it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mindjax.config import ModelConfig
from mindjax.models.catalog import CATALOG

# As in Qwen/Qwen3-VL-4B-Instruct: rotary settings under their old names, the tie stated twice.
PUBLISHED_4B: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}


def changed(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(PUBLISHED_4B)
    *parents, name = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[name] = value
    return config


def test_published_file() -> None:
    assert ModelConfig.from_hf(PUBLISHED_4B) == CATALOG["qwen3-vl-4b"]


def test_new_spelling_of_the_rotary_settings() -> None:
    config = copy.deepcopy(PUBLISHED_4B)
    rope = config["text_config"].pop("rope_scaling")
    theta = config["text_config"].pop("rope_theta")
    config["text_config"]["rope_parameters"] = {**rope, "rope_theta": theta}
    assert ModelConfig.from_hf(config) == CATALOG["qwen3-vl-4b"]
    other = {**rope, "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
    config["text_config"]["rope_parameters"] = other
    assert ModelConfig.from_hf(config).text.rope_theta == 1e4
    assert ModelConfig.from_hf(config).text.mrope_section == (16, 24, 24)


@pytest.mark.parametrize("name", CATALOG)
def test_round_trip(name: str) -> None:
    written = json.loads(json.dumps(CATALOG[name].to_hf()))
    assert ModelConfig.from_hf(written) == CATALOG[name]


@pytest.mark.parametrize("name", CATALOG)
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    odd = replace(
        CATALOG[name],
        vision=replace(CATALOG[name].vision, rope_theta=777.0),
        text=replace(CATALOG[name].text, norm_topk_prob=True, rms_norm_eps=1e-5, rope_theta=12_345.0),
        tie_word_embeddings=not CATALOG[name].tie_word_embeddings,
        initializer_range=0.03,
    )
    (tmp_path / "config.json").write_text(json.dumps(odd.to_hf()))
    theirs = AutoConfig.from_pretrained(tmp_path)
    text = theirs.text_config
    assert theirs.model_type == ("qwen3_vl_moe" if odd.text.num_experts else "qwen3_vl")
    assert (text.num_hidden_layers, text.num_key_value_heads, text.head_dim, text.rms_norm_eps) == (
        odd.text.num_hidden_layers, odd.text.num_key_value_heads, odd.text.head_dim, 1e-5
    )  # fmt: skip
    assert text.rope_parameters["rope_theta"] == 12_345.0
    assert tuple(text.rope_parameters["mrope_section"]) == odd.text.mrope_section
    assert theirs.vision_config.rope_parameters["rope_theta"] == 777.0
    assert theirs.tie_word_embeddings == odd.tie_word_embeddings
    if odd.text.num_experts:
        assert (text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size) == (
            odd.text.num_experts, odd.text.num_experts_per_tok, odd.text.moe_intermediate_size
        )  # fmt: skip
    theirs.save_pretrained(tmp_path / "again")
    assert ModelConfig.from_hf(json.loads((tmp_path / "again" / "config.json").read_text())) == odd


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "qwen2_5_vl", "model_type is 'qwen2_5_vl'"),
        ("text_config.rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope type"),
        ("text_config.attention_bias", True, "attention_bias"),
        ("text_config.hidden_act", "gelu", "hidden_act"),
        ("vision_config.hidden_act", "quick_gelu", "vision hidden_act"),
        ("text_config.mlp_only_layers", [0], "mlp_only_layers"),
        ("text_config.decoder_sparse_step", 2, "decoder_sparse_step"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        ("vision_config.out_hidden_size", 2048, "out_hidden_size must equal"),
        ("vision_config.deepstack_visual_indexes", [5, 24], "deepstack_visual_indexes"),
        ("vision_config.deepstack_visual_indexes", [5, 5], "deepstack_visual_indexes"),
        ("vision_config.num_position_embeddings", 2000, "square"),
        ("text_config.num_key_value_heads", 5, "num_key_value_heads"),
        ("text_config.rope_scaling", {"rope_type": "default", "mrope_section": [1, 2, 3]}, "mrope_section"),
    ],
)
def test_what_the_model_does_not_implement_is_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(changed(path, value))


def test_experts_of_either_name() -> None:
    written = CATALOG["tiny-moe"].to_hf()
    text = written["text_config"]
    text["num_local_experts"] = text.pop("num_experts")  # what transformers 5 writes
    assert ModelConfig.from_hf(written) == CATALOG["tiny-moe"]
    del text["num_local_experts"]
    with pytest.raises(ValueError, match=r"no 'num_local_experts' in text_config"):
        ModelConfig.from_hf(written)


def test_a_missing_field_is_named() -> None:
    config = copy.deepcopy(PUBLISHED_4B)
    del config["vision_config"]["depth"]
    with pytest.raises(ValueError, match=r"no 'depth' in vision_config"):
        ModelConfig.from_hf(config)
