"""The files of a model folder: read as transformers reads them, written so that it reads them back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mindjax.data.processor import Processor, image_from_hf, video_from_hf


def test_a_folder_is_read_back_as_it_was_written(processor: Processor, model_folder: Path) -> None:
    loaded = Processor.from_pretrained(model_folder)
    assert (loaded.image, loaded.video) == (processor.image, processor.video)
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.special_tokens == processor.special_tokens


def test_transformers_reads_the_folder(processor: Processor, reference: Any) -> None:
    assert type(reference).__name__ == "Qwen3VLProcessor"
    assert type(reference.image_processor).__name__ == "Qwen2VLImageProcessor"
    for ours, theirs in ((processor.image, reference.image_processor), (processor.video, reference.video_processor)):
        assert (theirs.size["shortest_edge"], theirs.size["longest_edge"]) == (ours.min_pixels, ours.max_pixels)
        assert (theirs.patch_size, theirs.temporal_patch_size, theirs.merge_size) == (16, 2, 2)
        assert tuple(theirs.image_mean) == ours.mean and tuple(theirs.image_std) == ours.std
    assert reference.video_processor.fps == processor.video.fps
    assert reference.chat_template == processor.chat_template
    assert reference.image_token_id == processor.image_token_id
    assert reference.video_token_id == processor.video_token_id
    assert reference.vision_start_token_id == processor.vision_start_token_id
    assert reference.vision_end_token_id == processor.vision_end_token_id


def test_the_one_file_of_newer_transformers_is_read(processor: Processor, reference: Any, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    loaded = Processor.from_pretrained(tmp_path)
    assert (loaded.image, loaded.video) == (processor.image, processor.video)
    assert loaded.chat_template == processor.chat_template


@pytest.mark.parametrize(
    "settings,limits",
    [
        ({"size": {"shortest_edge": 1024, "longest_edge": 4096}}, (1024, 4096)),
        ({"min_pixels": 1024, "max_pixels": 4096}, (1024, 4096)),
        ({"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 1024, "max_pixels": 4096}, (1024, 4096)),
        ({"size": {"shortest_edge": 1024, "longest_edge": 4096}, "max_pixels": None}, (1024, 4096)),
        ({"size": {"min_pixels": 1024, "max_pixels": 4096}}, (1024, 4096)),
        ({"size": {"shortest_edge": 1024, "longest_edge": 9999}, "max_pixels": 4096}, (1024, 4096)),
    ],
)
def test_pixel_limits_in_all_spellings(settings: dict[str, Any], limits: tuple[int, int]) -> None:
    for read in (image_from_hf, video_from_hf):
        result = read(settings)
        assert (result.min_pixels, result.max_pixels) == limits


def test_defaults_are_those_of_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    for ours, theirs in ((image_from_hf({}), Qwen2VLImageProcessor()), (video_from_hf({}), Qwen3VLVideoProcessor())):
        assert (ours.min_pixels, ours.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])
        assert ours.patch_size == theirs.patch_size and ours.mean == tuple(theirs.image_mean)
        assert ours.std == tuple(theirs.image_std) and ours.rescale_factor == theirs.rescale_factor
    video = video_from_hf({})
    for name in ("fps", "num_frames", "min_frames", "max_frames", "max_video_tokens", "do_sample_frames"):
        assert getattr(video, name) == getattr(Qwen3VLVideoProcessor, name), name


def test_what_is_not_implemented_is_refused() -> None:
    for settings, match in (
        ({"do_resize": False}, "a.json sets do_resize"),
        ({"resample": 2}, "resample"),
        ({"size": {"height": 4}}, "shortest_edge"),
        ({"image_std": [0, 1, 1]}, "nonzero"),
        ({"min_pixels": 9, "max_pixels": 8}, "min <= max"),
    ):
        with pytest.raises(ValueError, match=match):
            image_from_hf({"file": "a.json", **settings})


def test_broken_folders(processor: Processor, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        Processor.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Processor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="neither preprocessor_config"):
        Processor.from_pretrained(tmp_path)


def test_the_published_layout_of_a_chat_template_is_read(processor: Processor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'published' }}"}))
    assert Processor.from_pretrained(tmp_path).chat_template == "{{ 'published' }}"


def test_images_and_videos_must_agree_on_patches(processor: Processor) -> None:
    with pytest.raises(ValueError, match="patch_size 14"):
        replace(processor, image=replace(processor.image, patch_size=14))
