"""Videos to frames and patches: sampling, timestamps, and one size for all frames.

Rules and rounding are those of transformers' `Qwen3VLVideoProcessor` and `Qwen3VLProcessor._calculate_timestamps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from mindjax.data.images import (
    MAX_SOURCE_PIXELS,
    check_aspect_ratio,
    check_pixel_settings,
    cut_patches,
    decode_image,
    fit_area,
    image_name,
)


@dataclass(frozen=True)
class VideoProcessor:
    """How a video becomes patches; the fields of a published `video_preprocessor_config.json`.

    Attributes:
      patch_size, temporal_patch_size, merge_size, mean, std, rescale_factor: as in `ImageProcessor`.
      min_pixels, max_pixels: bounds on frames x height x width after resizing.
      fps: frames to sample per second of video; `num_frames`, when set, takes its place.
      min_frames, max_frames: bounds on the number of sampled frames, when `fps` decides it.
      do_sample_frames: False takes every frame.
      cap_pixels_per_frame, max_video_tokens: bound each frame as qwen-vl-utils does, off by default.
      max_source_pixels: a larger frame is refused, and so is an animation with more pixels in all than 64 such.
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 4_096
    max_pixels: int = 25_165_824
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    fps: float = 2.0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    do_sample_frames: bool = True
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768
    max_source_pixels: int = MAX_SOURCE_PIXELS

    def __post_init__(self) -> None:
        check_pixel_settings(self.min_pixels, self.max_pixels, self.mean, self.std)

    def target_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width of every frame after resizing.

        Raises:
          ValueError: fewer frames than a patch holds, or an aspect ratio above 200.
        """
        factor, temporal = self.patch_size * self.merge_size, self.temporal_patch_size
        if num_frames < temporal:
            raise ValueError(
                f"a video needs at least {temporal} frames, this one has {num_frames}; give it as an image"
            )
        max_pixels = self.max_pixels
        if self.cap_pixels_per_frame:
            cap = min(self.max_video_tokens * factor * factor, self.max_pixels // num_frames)
            max_pixels = max(cap, int(self.min_pixels * 1.05)) * num_frames
        if height < factor or width < factor:
            grow = max(factor / height, factor / width)
            height, width = int(height * grow), int(width * grow)
        check_aspect_ratio(height, width)
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        volume = round(num_frames / temporal) * temporal * rows * columns
        return fit_area(rows, columns, height, width, num_frames, volume, factor, self.min_pixels, max_pixels)

    def sample(self, total: int, source_fps: float) -> np.ndarray:
        """Indices of the frames to keep out of `total`, evenly spread, first and last included."""
        if not self.do_sample_frames:
            return np.arange(total)
        count = self.num_frames
        if count is None:
            count = int(total / source_fps * self.fps)
            count = min(max(count, self.min_frames), self.max_frames, total)
        return np.linspace(0, total - 1, count).round().astype(int)

    def timestamps(self, indices: Sequence[int] | np.ndarray, source_fps: float) -> list[float]:
        """Seconds at the middle of each temporal patch; the last frame repeats to fill the last patch."""
        step = self.temporal_patch_size
        seconds = [int(index) / source_fps for index in indices]
        seconds += [seconds[-1]] * (-len(seconds) % step)
        return [(seconds[i] + seconds[i + step - 1]) / 2 for i in range(0, len(seconds), step)]

    def __call__(
        self,
        source: Any,
        *,
        fps: float | None = None,
        frames_indices: Sequence[int] | None = None,
        name: str | None = None,
    ) -> tuple[list[np.ndarray], tuple[int, int], list[float]]:
        """Reads, samples, resizes and cuts one video.

        Args:
          source: a uint8 array [F, H, W, 3], a list of images (paths, PIL images, arrays, bytes), or the path of an
            animated GIF, WebP or PNG. Other containers (mp4 ...) need a decoder: give their frames.
          fps: frames per second of the source. An animation brings its own.
          frames_indices: where the given frames stood in the original video, when they are already sampled; then
            all are used.
          name: what to call the video in errors; by default its path.

        Returns:
          One patch array [n, C * temporal_patch_size * p * p] per temporal patch, the grid (rows, columns) that they
          share, and one timestamp in seconds per temporal patch.

        Raises:
          ValueError: unreadable or empty, no fps, frames of different sizes; the message names the video.
        """
        name = name or (image_name(source) if isinstance(source, (str, Path)) else "<video>")
        frames, fps = self._read(source, fps, name)
        if not fps or fps <= 0:
            raise ValueError(f"{name}: give the frames per second of the video as fps, its timestamps depend on it")
        if frames_indices is None:
            indices = self.sample(len(frames), fps)
            picked = [frames[i] for i in indices]
        else:
            indices, picked = np.asarray(frames_indices), list(frames)
            if len(indices) != len(picked):
                raise ValueError(f"{name}: {len(indices)} frames_indices for {len(picked)} frames")
        limit = self.max_source_pixels
        pixels = [decode_image(frame, max_pixels=limit, name=f"{name}, frame {i}") for i, frame in enumerate(picked)]
        shapes = {frame.shape[:2] for frame in pixels}
        if len(shapes) > 1:
            raise ValueError(f"{name}: frames have different sizes {sorted(shapes)}")
        try:
            size = self.target_size(len(pixels), *pixels[0].shape[:2])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        step = self.temporal_patch_size
        pixels += [pixels[-1]] * (-len(pixels) % step)
        cut = [cut_patches(np.stack(pixels[i : i + step]), size, self) for i in range(0, len(pixels), step)]
        return [patches for patches, _ in cut], cut[0][1], self.timestamps(indices, fps)

    def _read(self, source: Any, fps: float | None, name: str) -> tuple[Sequence[Any], float | None]:
        """The frames before sampling, undecoded where they were given so, and their rate."""
        if isinstance(source, (str, Path)):
            frames, own_fps = _read_animation(Path(source), self.max_source_pixels, name)
            return frames, fps or own_fps
        if isinstance(source, np.ndarray):
            if source.ndim != 4:
                raise ValueError(
                    f"{name}: a video array is [frames, height, width, channels], not {list(source.shape)}"
                )
        elif not isinstance(source, (list, tuple)):
            raise ValueError(f"{name}: a video is an array, a list of frames or a path, not {type(source).__name__}")
        if len(source) == 0:
            raise ValueError(f"{name}: the video has no frames")
        return source, fps


def _read_animation(path: Path, max_pixels: int, name: str) -> tuple[list[np.ndarray], float]:
    """All frames of an animated GIF, WebP or PNG, and the mean frame rate that its durations give."""
    decode_image(path, max_pixels=max_pixels, name=name)  # the checks and errors of a still image
    frames, milliseconds = [], 0.0
    try:
        with Image.open(path) as animation:
            count = getattr(animation, "n_frames", 1)
            if count * animation.width * animation.height > 64 * max_pixels:
                raise ValueError(f"{name}: {count} frames of {animation.size} pixels are too many to decode")
            for frame in ImageSequence.Iterator(animation):
                frames.append(np.asarray(frame.convert("RGB")))
                milliseconds += frame.info.get("duration", 0.0)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: the animation is corrupt or truncated: {error}") from error
    # Players show frames without a duration for 100 ms.
    return frames, 1000.0 * len(frames) / (milliseconds or 100.0 * len(frames))
