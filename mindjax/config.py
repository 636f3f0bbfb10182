"""Model shapes as frozen dataclasses, read from and written to published `config.json` files.

Field names are those of the published files; a layout that the model does not implement is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]
    num_position_embeddings: int = 2304
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels x temporal x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True)
class TextConfig:
    """The language model; `num_experts` 0 means dense."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mrope_section: tuple[int, int, int]
    rope_theta: float = 5_000_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 262_144
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001


@dataclass(frozen=True)
class ModelConfig:
    """A whole Qwen3-VL: text, vision, and the token ids that join them."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        text, vision = self.text, self.vision
        checks = [
            (vision.out_hidden_size == text.hidden_size, "vision.out_hidden_size must equal text.hidden_size"),
            (vision.hidden_size % vision.num_heads == 0, "vision.hidden_size must be divisible by vision.num_heads"),
            (vision.head_dim % 4 == 0, "the vision head_dim must be divisible by 4 (two rotary axes)"),
            (text.num_attention_heads % text.num_key_value_heads == 0,
             "text.num_attention_heads must be divisible by text.num_key_value_heads"),
            (sum(text.mrope_section) == text.head_dim // 2,
             f"text.mrope_section {text.mrope_section} must sum to head_dim / 2 = {text.head_dim // 2}"),
            (all(0 <= i < vision.depth for i in vision.deepstack_visual_indexes)
             and len(set(vision.deepstack_visual_indexes)) == len(vision.deepstack_visual_indexes),
             f"deepstack_visual_indexes {vision.deepstack_visual_indexes} must be distinct and below {vision.depth}"),
            (len(vision.deepstack_visual_indexes) <= text.num_hidden_layers,
             "there are more DeepStack levels than text layers"),
            (round(vision.num_position_embeddings**0.5) ** 2 == vision.num_position_embeddings,
             "vision.num_position_embeddings must be a square"),
            (text.num_experts == 0 or 0 < text.num_experts_per_tok <= text.num_experts,
             "text.num_experts_per_tok must lie in 1..num_experts"),
        ]  # fmt: skip
        problems = [message for ok, message in checks if not ok]
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Reads a parsed `config.json` of a Qwen3-VL or Qwen3-VL-MoE checkpoint.

        Raises:
          ValueError: for another model type, or a setting that this model does not implement.
        """
        kind = config.get("model_type")
        if kind not in ("qwen3_vl", "qwen3_vl_moe"):
            raise ValueError(f"model_type is {kind!r}; this reads 'qwen3_vl' and 'qwen3_vl_moe' checkpoints")
        text = _Section("text_config", config.get("text_config") or {})
        vision = _Section("vision_config", config.get("vision_config") or {})
        # Published files spell the rotary settings `rope_scaling` beside `rope_theta`; newer ones `rope_parameters`.
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        unsupported = {
            "rope type": rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"),
            "attention_bias": bool(text.get("attention_bias", False)),
            "hidden_act": text.get("hidden_act", "silu") != "silu",
            "vision hidden_act": vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh",
            "mlp_only_layers": bool(text.get("mlp_only_layers")),
            "decoder_sparse_step": text.get("decoder_sparse_step", 1) != 1,
            "quantization_config": bool(config.get("quantization_config")),
        }
        for name, is_unsupported in unsupported.items():
            if is_unsupported:
                raise ValueError(f"config.json sets {name} to something that Qwen3-VL models do not use")
        heads, hidden = text["num_attention_heads"], text["hidden_size"]
        head_dim = text.get("head_dim") or hidden // heads
        moe = kind == "qwen3_vl_moe"
        # transformers 5 writes num_local_experts, published files num_experts.
        experts = (text.get("num_experts") or text["num_local_experts"]) if moe else 0
        return cls(
            text=TextConfig(
                vocab_size=text["vocab_size"],
                hidden_size=hidden,
                intermediate_size=text["intermediate_size"],
                num_hidden_layers=text["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=text.get("num_key_value_heads") or heads,
                head_dim=head_dim,
                mrope_section=tuple(rope.get("mrope_section", (24, 20, 20))),
                rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 500_000.0))),
                rms_norm_eps=text.get("rms_norm_eps", 1e-6),
                max_position_embeddings=text.get("max_position_embeddings", 128_000),
                num_experts=experts,
                num_experts_per_tok=text["num_experts_per_tok"] if moe else 0,
                moe_intermediate_size=text["moe_intermediate_size"] if moe else 0,
                norm_topk_prob=text.get("norm_topk_prob", True),
                router_aux_loss_coef=text.get("router_aux_loss_coef", 0.001),
            ),
            vision=VisionConfig(
                depth=vision["depth"],
                hidden_size=vision["hidden_size"],
                intermediate_size=vision["intermediate_size"],
                num_heads=vision["num_heads"],
                out_hidden_size=vision["out_hidden_size"],
                deepstack_visual_indexes=tuple(vision["deepstack_visual_indexes"]),
                num_position_embeddings=vision["num_position_embeddings"],
                patch_size=vision["patch_size"],
                spatial_merge_size=vision["spatial_merge_size"],
                temporal_patch_size=vision["temporal_patch_size"],
                in_channels=vision.get("in_channels", 3),
                rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
            ),
            **{
                name: config[name]
                for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
                if name in config
            },
            # The published 2B and 4B state it at the top level, some text configs inside.
            tie_word_embeddings=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            initializer_range=text.get("initializer_range", 0.02),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model, with both spellings of the rotary settings, for old and new readers."""
        text, vision = self.text, self.vision
        moe = text.num_experts > 0
        rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": list(text.mrope_section)}
        text_config: dict[str, Any] = {
            "model_type": "qwen3_vl_moe_text" if moe else "qwen3_vl_text",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": text.rms_norm_eps,
            "max_position_embeddings": text.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_theta": text.rope_theta,
            "rope_scaling": rope,
            "rope_parameters": {**rope, "rope_theta": text.rope_theta},
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        if moe:
            text_config |= {
                "num_experts": text.num_experts,
                "num_experts_per_tok": text.num_experts_per_tok,
                "moe_intermediate_size": text.moe_intermediate_size,
                "norm_topk_prob": text.norm_topk_prob,
                "router_aux_loss_coef": text.router_aux_loss_coef,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        # Published files do not state it, it is always 10,000 there.
        vision_rope = {"rope_type": "axial", "rope_theta": vision.rope_theta}
        return {
            "architectures": ["Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl_moe" if moe else "qwen3_vl",
            "text_config": text_config,
            "vision_config": {
                "model_type": "qwen3_vl_moe" if moe else "qwen3_vl",
                "depth": vision.depth,
                "hidden_size": vision.hidden_size,
                "hidden_act": "gelu_pytorch_tanh",
                "intermediate_size": vision.intermediate_size,
                "num_heads": vision.num_heads,
                "in_channels": vision.in_channels,
                "patch_size": vision.patch_size,
                "spatial_merge_size": vision.spatial_merge_size,
                "temporal_patch_size": vision.temporal_patch_size,
                "out_hidden_size": vision.out_hidden_size,
                "num_position_embeddings": vision.num_position_embeddings,
                "deepstack_visual_indexes": list(vision.deepstack_visual_indexes),
                "initializer_range": self.initializer_range,
                **({"rope_parameters": vision_rope} if vision.rope_theta != 10_000.0 else {}),
            },
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
        }


class _Section(dict[str, Any]):
    """A part of config.json in which a missing field is an error that names it."""

    def __init__(self, name: str, values: dict[str, Any]):
        super().__init__(values)
        self.name = name

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"config.json has no {key!r} in {self.name}")
