"""Tokenizer, image and video settings and chat template of one model folder, as published checkpoints hold them."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindjax.data.images import ImageProcessor
from mindjax.data.video import VideoProcessor

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# What transformers assumes where a file is silent: the class attributes of Qwen2VLImageProcessor and
# Qwen3VLVideoProcessor (transformers 5.19).
_IMAGE_DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_VIDEO_DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "patch_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Processor:
    """All that turns messages into model inputs.

    Attributes:
      tokenizer: a fast transformers tokenizer with Qwen's control tokens.
      image, video: pixel settings; patch, temporal and merge sizes must agree.
      chat_template: jinja source.
    """

    tokenizer: PreTrainedTokenizerBase
    image: ImageProcessor
    video: VideoProcessor
    chat_template: str

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            if getattr(self.image, name) != getattr(self.video, name):
                raise ValueError(
                    f"images have {name} {getattr(self.image, name)} and videos {getattr(self.video, name)}; "
                    "one vision encoder reads both, they must agree"
                )

    @property
    def patch_size(self) -> int:
        return self.image.patch_size

    @property
    def temporal_patch_size(self) -> int:
        return self.image.temporal_patch_size

    @property
    def merge_size(self) -> int:
        return self.image.merge_size

    @cached_property
    def image_token_id(self) -> int:
        return self._token_id("<|image_pad|>")

    @cached_property
    def video_token_id(self) -> int:
        return self._token_id("<|video_pad|>")

    @cached_property
    def vision_start_token_id(self) -> int:
        return self._token_id("<|vision_start|>")

    @cached_property
    def vision_end_token_id(self) -> int:
        return self._token_id("<|vision_end|>")

    @cached_property
    def im_start_token_id(self) -> int:
        return self._token_id("<|im_start|>")

    @cached_property
    def im_end_token_id(self) -> int:
        return self._token_id("<|im_end|>")

    @cached_property
    def endoftext_token_id(self) -> int:
        return self._token_id("<|endoftext|>")

    def _token_id(self, token: str) -> int:
        ids = self.tokenizer.get_vocab()
        if token not in ids:
            raise ValueError(f"the tokenizer has no {token} token; it is not one of Qwen3-VL's")
        return ids[token]

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Control tokens and their ids; only the chat template may write them."""
        return {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    @cached_property
    def text_tokenizer(self) -> Tokenizer:
        """A copy of the tokenizer that reads control tokens as plain text."""
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        copy.encode_special_tokens = True
        copy.no_padding()
        copy.no_truncation()
        return copy

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text: a control token spelt out in it does not become one."""
        return self.text_tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def with_pixel_limits(self, min_pixels: int, max_pixels: int) -> Processor:
        """The same with other bounds on the pixels of an image."""
        return replace(self, image=replace(self.image, min_pixels=min_pixels, max_pixels=max_pixels))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Processor:
        """Reads the tokenizer, chat template and pixel settings of a model folder.

        The settings are those of `preprocessor_config.json` and `video_preprocessor_config.json`, or of the one
        `processor_config.json` that newer transformers write.

        Raises:
          ValueError: a missing file, or a setting that this package does not implement.
        """
        from transformers import AutoTokenizer

        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give a local model folder")
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(
            tokenizer=tokenizer,
            image=image_from_hf(_settings(folder, "preprocessor_config.json", "image_processor")),
            video=video_from_hf(_settings(folder, "video_preprocessor_config.json", "video_processor")),
            chat_template=_chat_template(folder, tokenizer),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes files that transformers' `AutoProcessor`, vLLM and `from_pretrained` read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        for name, settings in (
            ("preprocessor_config.json", image_to_hf(self.image)),
            ("video_preprocessor_config.json", video_to_hf(self.video)),
        ):
            (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _settings(folder: Path, file: str, key: str) -> dict[str, Any]:
    if (folder / file).is_file():
        return {"file": str(folder / file), **_read_json(folder / file)}
    together = folder / "processor_config.json"
    if together.is_file() and key in (settings := _read_json(together)):
        return {"file": str(together), **settings[key]}
    raise ValueError(f"{folder} has neither {file} nor a processor_config.json with {key!r}")


def _chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return _read_json(folder / "chat_template.json")["chat_template"]
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise ValueError(f"{folder} has no chat template (chat_template.jinja)")


def _shared_from_hf(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields that images and videos share; `min_pixels` and `max_pixels` win over `size`, as in transformers."""
    given = {name: value for name, value in settings.items() if value is not None}
    file = given.get("file", "the settings")
    for name, wanted in (("do_resize", True), ("resample", _BICUBIC), ("do_convert_rgb", True)):
        if given.get(name, wanted) != wanted:
            raise ValueError(f"{file} sets {name} to {given[name]!r}; only {wanted!r} is implemented")
    size = given.get("size", defaults["size"])
    # An old spelling puts min_pixels and max_pixels inside size.
    low = given.get("min_pixels", size.get("shortest_edge", size.get("min_pixels")))
    high = given.get("max_pixels", size.get("longest_edge", size.get("max_pixels")))
    if low is None or high is None:
        raise ValueError(f"{file} sets size to {size}; it needs shortest_edge and longest_edge (areas in pixels)")
    rescale, normalise = given.get("do_rescale", True), given.get("do_normalize", True)
    return {
        "patch_size": given.get("patch_size", defaults["patch_size"]),
        "temporal_patch_size": given.get("temporal_patch_size", 2),
        "merge_size": given.get("merge_size", 2),
        "min_pixels": low,
        "max_pixels": high,
        "mean": tuple(given.get("image_mean", defaults["image_mean"])) if normalise else (0.0, 0.0, 0.0),
        "std": tuple(given.get("image_std", defaults["image_std"])) if normalise else (1.0, 1.0, 1.0),
        "rescale_factor": given.get("rescale_factor", 1 / 255) if rescale else 1.0,
    }


def image_from_hf(settings: dict[str, Any]) -> ImageProcessor:
    """Reads a parsed `preprocessor_config.json` (key "file" names it in errors).

    Raises:
      ValueError: a setting that is not implemented.
    """
    return ImageProcessor(**_shared_from_hf(settings, _IMAGE_DEFAULTS))


def video_from_hf(settings: dict[str, Any]) -> VideoProcessor:
    """Reads a parsed `video_preprocessor_config.json` (key "file" names it in errors).

    Raises:
      ValueError: a setting that is not implemented.
    """
    own = ("num_frames", "fps", "min_frames", "max_frames", "do_sample_frames", "cap_pixels_per_frame")
    chosen = {name: settings[name] for name in (*own, "max_video_tokens") if settings.get(name) is not None}
    return VideoProcessor(**_shared_from_hf(settings, _VIDEO_DEFAULTS), **chosen)


def _shared_to_hf(settings: ImageProcessor | VideoProcessor) -> dict[str, Any]:
    return {
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
        "patch_size": settings.patch_size,
        "temporal_patch_size": settings.temporal_patch_size,
        "merge_size": settings.merge_size,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "rescale_factor": settings.rescale_factor,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": _BICUBIC,
    }


def image_to_hf(settings: ImageProcessor) -> dict[str, Any]:
    """The content of `preprocessor_config.json`."""
    return {"image_processor_type": "Qwen2VLImageProcessorFast", **_shared_to_hf(settings)}


def video_to_hf(settings: VideoProcessor) -> dict[str, Any]:
    """The content of `video_preprocessor_config.json`."""
    shared = {field.name for field in fields(ImageProcessor)}
    own = {f.name: getattr(settings, f.name) for f in fields(VideoProcessor) if f.name not in shared}
    return {"video_processor_type": "Qwen3VLVideoProcessor", **_shared_to_hf(settings), **own}
