"""Frame sampling, timestamps, sizes and pixels against transformers' Qwen3VLVideoProcessor."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mindjax.data.video import VideoProcessor

SMALL = VideoProcessor(min_pixels=4 * 32 * 32, max_pixels=8 * 64 * 64)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def transformers_video(**options: Any) -> Any:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    return Qwen3VLVideoProcessor(
        size={"shortest_edge": SMALL.min_pixels, "longest_edge": SMALL.max_pixels},
        cap_pixels_per_frame=options.pop("cap_pixels_per_frame", False),
        **options,
    )


@settings(max_examples=100, deadline=None)
@given(
    frames=st.integers(1, 40),
    height=st.integers(1, 900),
    width=st.integers(1, 900),
    low=st.integers(1, 10**6),
    extra=st.integers(0, 10**7),
)
def test_sizes_are_those_of_transformers(frames: int, height: int, width: int, low: int, extra: int) -> None:
    module = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    ours = VideoProcessor(min_pixels=low, max_pixels=low + extra)
    try:
        expected = module.smart_resize(frames, height, width, 2, 32, low, low + extra)
    except ValueError:
        with pytest.raises(ValueError, match=r"at least 2 frames|aspect ratio"):
            ours.target_size(frames, height, width)
    else:
        assert ours.target_size(frames, height, width) == expected


@settings(max_examples=50, deadline=None)
@given(total=st.integers(1, 3000), fps=st.sampled_from([0.5, 1.0, 24.0, 29.97]), count=st.sampled_from([None, 1, 2, 7]))
def test_sampling_and_timestamps_are_those_of_transformers(total: int, fps: float, count: int | None) -> None:
    reference = transformers_video(num_frames=count, fps=None if count else 2, max_frames=100)
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    ours = VideoProcessor(num_frames=count, max_frames=100)
    expected = reference.sample_frames(VideoMetadata(total_num_frames=total, fps=fps), num_frames=count)
    indices = ours.sample(total, fps)
    np.testing.assert_array_equal(indices, expected)
    assert ours.timestamps(indices, fps) == Qwen3VLProcessor._calculate_timestamps(None, expected, fps, 2)


@pytest.mark.parametrize("frames,height,width,cap", [(8, 64, 64, False), (9, 50, 70, False), (12, 300, 20, True)])
def test_patches_are_those_of_transformers(frames: int, height: int, width: int, cap: bool) -> None:
    """Grids and timestamps are equal, pixels within the bounds of test_images.py."""
    from dataclasses import replace

    options = {"cap_pixels_per_frame": cap, "max_video_tokens": 2}
    video = noise(frames, height, width, 3)
    metadata = [{"total_num_frames": frames, "fps": 4.0}]
    expected = transformers_video(**options)([video], video_metadata=metadata, return_tensors="pt")
    patches, grid, seconds = replace(SMALL, **options)(video, fps=4.0)
    assert [len(patches), *grid] == expected["video_grid_thw"][0].tolist()
    assert len(seconds) == len(patches)
    levels = np.abs(np.concatenate(patches) - expected["pixel_values_videos"].numpy()) * 127.5
    assert levels.max() < 2.001 and (levels > 0.5).mean() < 0.01


def test_all_frames_or_frames_that_are_sampled_already() -> None:
    from dataclasses import replace

    video = noise(6, 64, 64, 3)
    everything = replace(SMALL, do_sample_frames=False)
    patches, _, seconds = everything(video, fps=2.0)
    assert (len(patches), seconds) == (3, [0.25, 1.25, 2.25])
    patches, _, seconds = SMALL(list(video[:5]), fps=2.0, frames_indices=[0, 4, 8, 12, 16])
    assert (len(patches), seconds) == (3, [1.0, 5.0, 8.0])
    with pytest.raises(ValueError, match="2 frames_indices for 6 frames"):
        SMALL(video, fps=2.0, frames_indices=[0, 1])


def test_odd_videos_repeat_their_last_frame() -> None:
    patches, _, _ = SMALL(noise(5, 32, 32, 3), fps=2.0, frames_indices=range(5))
    last = patches[-1].reshape(-1, 3, 2, 256)
    np.testing.assert_array_equal(last[:, :, 0], last[:, :, 1])
    assert (patches[0].reshape(-1, 3, 2, 256)[:, :, 0] != patches[0].reshape(-1, 3, 2, 256)[:, :, 1]).any()


@pytest.mark.parametrize("form", ["gif", "png", "webp"])
def test_animations_bring_their_frames_and_rate(form: str, tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    first, *rest = [Image.new("RGB", (64, 64), colour) for colour in colours]
    options = {"lossless": True} if form == "webp" else {}
    first.save(tmp_path / f"a.{form}", save_all=True, append_images=rest, duration=250, **options)
    patches, grid, seconds = SMALL(tmp_path / f"a.{form}")
    assert seconds == [0.125, 0.625] and grid == (4, 4)
    shown = np.stack(patches)[:, 0].reshape(2, 3, 2, 256)[..., 0].transpose(0, 2, 1).reshape(4, 3)
    np.testing.assert_array_equal(shown > 0, np.array(colours) > 0)


def test_bad_videos_are_named(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    Image.new("RGB", (64, 64)).save(tmp_path / "still.png")
    frames = [noise(40, 40, 3), noise(40, 41, 3)]
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "film.mp4", {"fps": 2.0}, "film.mp4: this is not an image"),
        (tmp_path / "missing.gif", {}, "missing.gif: there is no such"),
        (tmp_path / "still.png", {}, "still.png: a video needs at least 2 frames"),
        (noise(4, 40, 40, 3), {}, "<video>: give the frames per second"),
        (noise(4, 40, 40, 3), {"fps": 0.0}, "frames per second"),
        (noise(4, 40, 40), {"fps": 1.0}, r"\[frames, height, width, channels\]"),
        (noise(4, 40, 40, 3).astype(np.float32), {"fps": 1.0}, "frame 0: an image array must be uint8"),
        ([], {"fps": 1.0}, "no frames"),
        (7, {"fps": 1.0}, "not int"),
        (frames, {"fps": 1.0}, "different sizes"),
        ([frames[0], b"bad"], {"fps": 1.0}, "frame 1: this is not an image"),
        (noise(4, 1, 201, 3), {"fps": 1.0}, "<video>: .*aspect ratio"),
    ]
    for source, options, match in cases:
        with pytest.raises(ValueError, match=match):
            SMALL(source, **options)
    with pytest.raises(ValueError, match="clip 9: "):
        SMALL(noise(4, 40, 40, 3), name="clip 9")
