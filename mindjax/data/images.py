"""Images and frames to normalised patches: decode, smart resize, antialiased bicubic, patchify.

Resizing is two products with matrices that are *inputs* of one jitted function, and both the source and the target
are padded to a few bucket sizes, so that an image of a new size compiles nothing. The arithmetic is Pillow's: the
horizontal pass first, each pass rounded half up and clipped to 0..255, as `Image.resize` does with uint8 and as
torchvision does within one or two grey levels.

Shape suffixes: F frames, H W source size, h w target size, C channels, N blocks of B outputs, S source window of one
block, p patch side, m merge side.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

# Pillow warns at this size; a 9,000 x 9,000 scan still fits.
MAX_SOURCE_PIXELS = 89_478_485
MAX_ASPECT_RATIO = 200  # transformers' smart_resize refuses anything thinner


@dataclass(frozen=True)
class ImageProcessor:
    """How an image becomes patches; the fields of a published `preprocessor_config.json`.

    Attributes:
      patch_size, temporal_patch_size, merge_size: side of a patch, frames in a patch, side of a merge block in patches.
      min_pixels, max_pixels: bounds on height x width after resizing.
      mean, std: per channel, for values in [0, 1] (after rescaling).
      rescale_factor: multiplies the 0..255 values, 1 where rescaling is off.
      max_source_pixels: larger files are refused before they are decoded (decompression bombs). Pillow's own limit,
        `Image.MAX_IMAGE_PIXELS`, holds beside it.
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    max_source_pixels: int = MAX_SOURCE_PIXELS

    def __post_init__(self) -> None:
        check_pixel_settings(self.min_pixels, self.max_pixels, self.mean, self.std)

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing: multiples of patch_size x merge_size, the area within the limits."""
        return smart_resize(height, width, self.patch_size * self.merge_size, self.min_pixels, self.max_pixels)

    def __call__(self, source: Any, name: str | None = None) -> tuple[np.ndarray, tuple[int, int]]:
        """Decodes, resizes, normalises and cuts one image.

        Args:
          source: what `decode_image` takes.
          name: what to call the image in errors; by default its path.

        Returns:
          patches [n, C * temporal_patch_size * p * p] float32 in merge-block order, and the grid (rows, columns) of
          patches, with n = rows * columns. A still image fills all frames of its patches.
        """
        pixels = decode_image(source, max_pixels=self.max_source_pixels, name=name)
        with_name = image_name(source, name)
        try:
            size = self.target_size(*pixels.shape[:2])
        except ValueError as error:
            raise ValueError(f"{with_name}: {error}") from None
        return cut_patches(pixels[None], size, self)


def check_pixel_settings(min_pixels: int, max_pixels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ValueError for limits or statistics that no image could satisfy."""
    if not 0 < min_pixels <= max_pixels:
        raise ValueError(f"min_pixels {min_pixels} and max_pixels {max_pixels} must satisfy 0 < min <= max")
    if len(mean) != 3 or len(std) != 3 or 0 in std:
        raise ValueError(f"mean {mean} and std {std} must have one entry for each of 3 channels, std nonzero")


def image_name(source: Any, name: str | None = None) -> str:
    """What to call an image in an error: the given name, its path, or its kind."""
    if name is not None:
        return name
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "<PIL image>"
    return f"<{type(source).__name__}>"


def decode_image(source: Any, *, max_pixels: int = MAX_SOURCE_PIXELS, name: str | None = None) -> np.ndarray:
    """Reads one image as 8-bit RGB.

    - EXIF orientation is applied. An animation gives its first frame, as transformers and image viewers do.
    - Alpha is dropped and the stored colours show, whatever lay beneath: that is Pillow's `convert("RGB")`, which
      transformers uses and Qwen was trained behind; composing on white would show the model other pixels.
    - CMYK is converted by Pillow's formula; 16-bit grey keeps its high byte (`convert` would saturate it).

    Args:
      source: a path, bytes of an encoded image, a PIL image, or a uint8 array [H, W], [H, W, 1], [H, W, 3] or
        [H, W, 4].
      max_pixels: height x width beyond which the image is refused, before decoding.
      name: what to call the image in errors; by default its path.

    Returns:
      [H, W, 3] uint8.

    Raises:
      ValueError: a missing, empty, corrupt, too large or unsupported image; the message names it.
    """
    name = image_name(source, name)
    if isinstance(source, np.ndarray):
        pixels = _rgb_array(source, name)
        _check_size(pixels.shape[0], pixels.shape[1], max_pixels, name)
        return pixels
    image = _open(source, name)
    try:
        _check_size(image.height, image.width, max_pixels, name)
        try:
            image.load()
            image = ImageOps.exif_transpose(image)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
            raise ValueError(f"{name}: the image is corrupt or truncated: {error}") from error
        return _to_rgb(image, name)
    finally:
        if image is not source:
            image.close()


def _open(source: Any, name: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (str, Path)):
        if str(source).startswith(("http://", "https://")):
            raise ValueError(f"{name}: images are not downloaded; save the file and give its path")
        if not Path(source).is_file():
            raise ValueError(f"{name}: there is no such image file")
        if Path(source).stat().st_size == 0:
            raise ValueError(f"{name}: the image file is empty")
    elif isinstance(source, (bytes, bytearray)):
        if not source:
            raise ValueError(f"{name}: the image is empty (0 bytes)")
        source = io.BytesIO(source)
    else:
        raise ValueError(
            f"{name}: an image is a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}"
        )
    try:
        return Image.open(source)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:
        raise ValueError(f"{name}: this is not an image that Pillow can read: {error}") from error


def _check_size(height: int, width: int, max_pixels: int, name: str) -> None:
    if height == 0 or width == 0:
        raise ValueError(f"{name}: the image is empty, {width} x {height} pixels")
    if height * width > max_pixels:
        raise ValueError(
            f"{name}: {width} x {height} pixels are more than max_source_pixels={max_pixels} "
            "(a decompression bomb?); shrink the image or raise the limit"
        )


def _rgb_array(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.dtype != np.uint8:
        raise ValueError(f"{name}: an image array must be uint8 (0..255), not {pixels.dtype}")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"{name}: an image array is [height, width], or [height, width, channels] with 1, 3 or 4 channels last, "
            f"not {list(pixels.shape)}"
        )
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3]


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I;16"):
        high_byte = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return _rgb_array(high_byte, name)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name}: pixels of mode {image.mode!r} (32 bits) have no agreed range; convert the image to 8 or 16 bits"
        )
    try:
        return np.asarray(image.convert("RGB"))
    except Exception as error:
        raise ValueError(f"{name}: mode {image.mode!r} cannot be converted to RGB: {error}") from error


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size an image is given: sides that are multiples of `factor`, the area within the limits, the shape kept.

    The rounding is transformers' `smart_resize` for Qwen2-VL, half to even included; a side never falls below
    `factor`, so that for a thin image the minimum wins over `max_pixels`.

    Raises:
      ValueError: an aspect ratio above 200.
    """
    check_aspect_ratio(height, width)
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    return fit_area(rows, columns, height, width, 1, rows * columns, factor, min_pixels, max_pixels)


def check_aspect_ratio(height: int, width: int) -> None:
    """Raises ValueError for a shape that smart resizing refuses."""
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"{width} x {height} pixels have an aspect ratio above {MAX_ASPECT_RATIO}; cut or pad the image"
        )


def fit_area(
    rows: int,
    columns: int,
    height: int,
    width: int,
    frames: int,
    volume: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
) -> tuple[int, int]:
    """Shrinks or grows (rows, columns) where `volume` (frames x rows x columns, rounded) leaves the pixel limits."""
    if volume > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """The antialiased bicubic filter (a = -0.5) as a matrix, with the arithmetic of Pillow's `precompute_coeffs`.

    Returns:
      [target, source] float32; row i holds the weights of output i, which sum to 1. For source == target it is the
      identity.
    """
    scale = source / target
    stretch = max(scale, 1.0)  # when shrinking the filter widens, which is the antialiasing
    support = 2.0 * stretch
    centre = ((np.arange(target) + 0.5) * scale)[:, None]
    first = np.maximum(np.floor(centre - support + 0.5), 0)
    last = np.minimum(np.floor(centre + support + 0.5), source)
    index = np.arange(source)[None, :]
    x = np.abs((index - centre + 0.5) / stretch)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    weights = np.where((x < 2) & (index >= first) & (index < last), weights, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    # Pillow keeps 22 bits of each weight for 8-bit images; the same bits here make ties round the same way.
    return (np.round(weights * 2**22) / 2**22).astype(np.float32)


@functools.lru_cache(maxsize=256)
def bicubic_windows(source: int, target: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """`bicubic_matrix` without its zeros: each block of outputs with the short stretch of the source that it needs.

    Ten times fewer products than the whole matrix for a photograph. Only the buckets of source and target, and that
    of their ratio, decide the shapes.

    Returns:
      starts [N] int32 and weights [N, block, S] float32, zero in the padding, with N * block = bucket(target, block).
    """
    padded_source, padded_target = bucket(source, 8), bucket(target, block)
    matrix = np.zeros((padded_target, padded_source), np.float32)
    matrix[:target, :source] = bicubic_matrix(source, target)
    scale = source / target
    span = min(bucket(math.ceil(block * scale + 4 * max(scale, 1.0)) + 2, 8), padded_source)
    count = padded_target // block
    starts = np.zeros(count, np.int32)
    weights = np.zeros((count, block, span), np.float32)
    for i, rows in enumerate(matrix.reshape(count, block, padded_source)):
        used = np.flatnonzero(rows.any(axis=0))
        if len(used):
            starts[i] = min(used[0], padded_source - span)
            assert used[-1] < starts[i] + span, (source, target, block)
            weights[i] = rows[:, starts[i] : starts[i] + span]
    for array in (starts, weights):
        array.flags.writeable = False
    return starts, weights


def bucket(size: int, multiple: int) -> int:
    """The smallest bucket that holds `size`: a power of 2 up to 512, of sqrt(2) above, rounded up to `multiple`.

    The number of compiled shapes grows with the logarithm of the sizes; small images, of which padding costs little,
    share the coarser steps.
    """
    steps = 1 if size <= 512 else 2
    power = math.ceil(steps * math.log2(max(size, 32)) - 1e-9) / steps
    return math.ceil(math.ceil(2**power) / multiple) * multiple


def _filter_axis(x: jax.Array, axis: int, starts_N: jax.Array, weights_NBS: jax.Array) -> jax.Array:
    """Filters `axis` of a 4-dimensional array of 0..255 values; the result has it last."""
    span = weights_NBS.shape[2]
    windows = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(x, start, span, axis))(starts_N)
    windows = jnp.moveaxis(windows, axis + 1, -1)
    # The weights are no bf16 or TF32 numbers: lower precision would move pixels by grey levels.
    filtered = jnp.einsum("NBS,NabcS->abcNB", weights_NBS, windows, precision=jax.lax.Precision.HIGHEST)
    return jnp.clip(jnp.floor(filtered.reshape(*filtered.shape[:3], -1) + 0.5), 0.0, 255.0)


@functools.partial(jax.jit, static_argnames=("patch_size", "merge_size"))
def _resize_and_cut(
    frames_FHWC: jax.Array,
    windows: tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None,
    offset_C: jax.Array,
    scale_C: jax.Array,
    *,
    patch_size: int,
    merge_size: int,
) -> jax.Array:
    """Padded frames to blocks [h/(pm), w/(pm), m, m, C, F, p, p] float32 of (value - offset) / scale.

    `windows` are those of the rows and of the columns, None where the frames have the target size already.
    """
    x = jnp.moveaxis(frames_FHWC.astype(jnp.float32), 3, 1)  # FCHW
    if windows is not None:
        rows, columns = windows
        x = _filter_axis(x, 3, *columns)  # FCHw
        x = jnp.swapaxes(_filter_axis(x, 2, *rows), 2, 3)  # FCwh -> FChw
    x = (x - offset_C[:, None, None]) / scale_C[:, None, None]
    frames, channels, h, w = x.shape
    side = patch_size * merge_size
    x = x.reshape(frames, channels, h // side, merge_size, patch_size, w // side, merge_size, patch_size)
    return x.transpose(2, 5, 3, 6, 1, 0, 4, 7)


def cut_patches(frames: np.ndarray, size: tuple[int, int], settings: Any) -> tuple[np.ndarray, tuple[int, int]]:
    """Resizes frames of one shape to `size`, normalises them and cuts them into patches.

    Args:
      frames: [F, H, W, 3] uint8, F either 1 (a still image) or `settings.temporal_patch_size`.
      size: (height, width) to resize to, multiples of patch_size x merge_size.
      settings: an `ImageProcessor` or `VideoProcessor`.

    Returns:
      patches [n, C * temporal_patch_size * p * p] float32 in merge-block order, and the grid (rows, columns).
    """
    patch, merge = settings.patch_size, settings.merge_size
    side = patch * merge
    count, height, width, channels = frames.shape
    same = (height, width) == size
    # Frames that stay as they are go in at the size of the target's bucket, others at that of the source.
    padded_shape = (bucket(height, side if same else 8), bucket(width, side if same else 8))
    padded = np.zeros((count, *padded_shape, channels), np.uint8)
    padded[:, :height, :width] = frames
    blocks = _resize_and_cut(
        padded,
        None if same else (bicubic_windows(height, size[0], side), bicubic_windows(width, size[1], side)),
        np.asarray(settings.mean, np.float32) / np.float32(settings.rescale_factor),
        np.asarray(settings.std, np.float32) / np.float32(settings.rescale_factor),
        patch_size=patch,
        merge_size=merge,
    )
    blocks = np.asarray(blocks)[: size[0] // side, : size[1] // side]
    if count == 1:
        blocks = np.broadcast_to(blocks, (*blocks.shape[:5], settings.temporal_patch_size, *blocks.shape[6:]))
    grid = (size[0] // patch, size[1] // patch)
    return np.ascontiguousarray(blocks).reshape(grid[0] * grid[1], -1), grid
