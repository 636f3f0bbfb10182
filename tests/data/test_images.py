"""Decoding, smart resize, antialiased bicubic and patches, against transformers and against bad files."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mindjax.data import images
from mindjax.data.images import ImageProcessor, bicubic_matrix, cut_patches, decode_image, smart_resize

SMALL = ImageProcessor(min_pixels=32 * 32, max_pixels=160 * 160)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# --- sizes ---


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    factor=st.sampled_from([8, 28, 32]),
    min_pixels=st.integers(1, 200_000),
    extra=st.integers(0, 2_000_000),
)
@example(height=48, width=80, factor=32, min_pixels=1, extra=10**6)  # ties: 1.5 and 2.5 blocks round to even
@example(height=1, width=200, factor=32, min_pixels=1, extra=10**6)
@example(height=1, width=201, factor=32, min_pixels=1, extra=10**6)
def test_smart_resize_is_transformers(height: int, width: int, factor: int, min_pixels: int, extra: int) -> None:
    reference = importlib.import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    arguments = (height, width, factor, min_pixels, min_pixels + extra)
    try:
        expected = reference.smart_resize(*arguments)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(*arguments)
    else:
        assert smart_resize(*arguments) == expected


def test_pixel_limits_hold() -> None:
    small = ImageProcessor(min_pixels=64 * 64, max_pixels=96 * 96)
    for shape in [(20, 20), (96, 96), (700, 500)]:
        rows, columns = small(noise(*shape))[1]
        assert 64 * 64 <= rows * columns * 16 * 16 <= 96 * 96
    with pytest.raises(ValueError, match="min <= max"):
        ImageProcessor(min_pixels=100, max_pixels=99)


# --- pixels ---


@pytest.mark.parametrize("height,width", [(160, 160), (30, 41), (97, 70), (500, 301), (17, 900)])
@pytest.mark.parametrize("backend", ["pil", "torch"])
def test_patches_are_those_of_transformers(height: int, width: int, backend: str) -> None:
    """Grids are equal. Pixels:

    Both libraries round to whole grey levels after each of two passes. Pillow's weights are ours bit for bit, so a
    pixel differs, by one level, only where float32 accumulation (error about 1e-5 levels) falls on the other side of
    a tie: about 2e-5 of all. torch keeps 16-bit weights, which moves under 1 % of the pixels, by one level a pass.
    Normalisation adds float32 rounding, 1e-4 levels at most.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    level = 1 / 255 / 0.5
    reference = {"pil": Qwen2VLImageProcessorPil, "torch": Qwen2VLImageProcessor}[backend](
        size={"shortest_edge": SMALL.min_pixels, "longest_edge": SMALL.max_pixels},
        patch_size=16,
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.5, 0.5, 0.5],
    )
    ours = ImageProcessor(min_pixels=SMALL.min_pixels, max_pixels=SMALL.max_pixels, mean=(0.5, 0.4, 0.3))
    pixels = noise(height, width)
    expected = reference(pixels, return_tensors="np", input_data_format="channels_last")
    patches, grid = ours(pixels)
    assert [1, *grid] == expected["image_grid_thw"][0].tolist()
    assert patches.dtype == np.float32 and patches.shape == expected["pixel_values"].shape
    levels = np.abs(patches - expected["pixel_values"]) / level
    if ours.target_size(height, width) == (height, width):
        assert levels.max() < 1e-4
    else:
        assert levels.max() < (1.001 if backend == "pil" else 2.001)
        assert (levels > 0.5).mean() < (1e-3 if backend == "pil" else 1e-2)


def test_rescaling_and_normalising_can_be_off() -> None:
    from mindjax.data.processor import image_from_hf

    pixels = noise(32, 32)
    plain = image_from_hf({"patch_size": 16, "do_rescale": False, "do_normalize": False})
    assert set(np.unique(plain(pixels)[0])) == set(np.unique(decode_resized(pixels, plain)))
    scaled = image_from_hf({"patch_size": 16, "do_normalize": False})
    np.testing.assert_allclose(scaled(pixels)[0], plain(pixels)[0] / 255, rtol=1e-6)


def decode_resized(pixels: np.ndarray, settings: ImageProcessor) -> np.ndarray:
    height, width = settings.target_size(*pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def test_an_image_of_the_target_size_is_only_cut() -> None:
    """Every value, in the order blocks, patches in a block, channel, time, row, column."""
    pixels = noise(64, 96)
    patches, grid = SMALL(pixels)
    assert grid == (4, 6)
    expected = np.empty((24, 3, 2, 16, 16), np.float32)
    n = 0
    for block_row in range(2):
        for block_column in range(3):
            for row in range(2):
                for column in range(2):
                    top, left = (2 * block_row + row) * 16, (2 * block_column + column) * 16
                    expected[n] = pixels[top : top + 16, left : left + 16].transpose(2, 0, 1)[:, None]
                    n += 1
    # One rounding of x / 127.5 - 1 in float32.
    np.testing.assert_allclose(patches, (expected / 127.5 - 1).reshape(24, -1), atol=2e-7)


def test_the_filter_is_a_partition_of_unity_and_an_identity() -> None:
    np.testing.assert_array_equal(bicubic_matrix(7, 7), np.eye(7))
    for source, target in [(5, 12), (200, 7), (64, 64), (33, 32)]:
        np.testing.assert_allclose(bicubic_matrix(source, target).sum(axis=1), 1, atol=1e-5)


def test_a_new_image_size_compiles_nothing() -> None:
    """The number of compiled shapes follows the buckets, which are few, and not the sizes, which are many."""
    compiled = images._resize_and_cut._cache_size
    images._resize_and_cut.clear_cache()
    for height, width in [(300, 301), (257, 260), (333, 300), (290, 340), (311, 259)]:
        cut_patches(noise(height, width)[None], (256, 224), SMALL)
    assert compiled() == 1
    sizes = set(map(tuple, np.random.default_rng(1).integers(65, 512, (60, 2)).tolist()))
    assert len(sizes) == 60
    for height, width in sizes:
        cut_patches(noise(height, width)[None], SMALL.target_size(height, width), SMALL)
    assert compiled() <= 25


# --- decoding ---


def test_paths_bytes_images_and_arrays_give_the_same(tmp_path: Path) -> None:
    pixels = noise(20, 30)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image, "PNG"), image, pixels):
        np.testing.assert_array_equal(decode_image(source), pixels)
    image.getpixel((0, 0))  # a caller's image stays open


def test_grey_arrays() -> None:
    grey = noise(5, 6)[:, :, 0]
    for array in (grey, grey[:, :, None]):
        np.testing.assert_array_equal(decode_image(array), np.repeat(grey[:, :, None], 3, axis=2))


def test_cmyk() -> None:
    image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))  # full magenta and yellow: red
    decoded = decode_image(encoded(image, "TIFF"))
    np.testing.assert_array_equal(decoded, np.full((4, 4, 3), (255, 0, 0)))


def test_sixteen_bits_keep_their_range() -> None:
    """Pillow's own conversion saturates: everything above 255 would be white."""
    levels = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for form in ("PNG", "TIFF"):
        decoded = decode_image(encoded(Image.fromarray(levels), form))
        np.testing.assert_array_equal(decoded[0, :, 0], [0, 0, 1, 128, 255])
        np.testing.assert_array_equal(decoded[..., 0], decoded[..., 2])


def test_alpha_is_dropped_as_transformers_drops_it() -> None:
    """The colour stored under transparent pixels shows; nothing is blended with a background."""
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, [[0, 255], [128, 1]]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.info["transparency"] = 1
    grey_alpha = Image.fromarray(np.full((2, 2, 2), (77, 0), np.uint8), "LA")
    cases = [
        (encoded(Image.fromarray(rgba), "PNG"), (200, 0, 0)),
        (rgba, (200, 0, 0)),
        (encoded(palette, "PNG", transparency=1), (10, 20, 30)),
        (encoded(grey_alpha, "PNG"), (77, 77, 77)),
    ]
    for source, colour in cases:
        np.testing.assert_array_equal(decode_image(source), np.full((2, 2, 3), colour))
    transforms = importlib.import_module("transformers.image_transforms")
    for source, _ in cases:
        if isinstance(source, bytes):
            expected = np.asarray(transforms.convert_to_rgb(Image.open(io.BytesIO(source))))
            np.testing.assert_array_equal(decode_image(source), expected)


def test_exif_rotation_is_applied() -> None:
    pixels = noise(10, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be shown turned by 90 degrees clockwise
    data = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data), np.rot90(pixels, k=-1))
    np.testing.assert_array_equal(decode_image(Image.open(io.BytesIO(data))), np.rot90(pixels, k=-1))


def test_an_animation_gives_its_first_frame() -> None:
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    for form in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encoded(first, form, save_all=True, append_images=[second], **options)
        np.testing.assert_array_equal(decode_image(data)[0, 0], [255, 0, 0], err_msg=form)


def bad_files() -> dict[str, tuple[bytes | None, str]]:
    """File name -> content (None: no such file) and a part of the message."""
    photo = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    png = encoded(Image.fromarray(noise(64, 64)), "PNG")
    broken_png = bytearray(png)
    broken_png[len(png) // 2 : len(png) // 2 + 40] = bytes(40)
    return {
        "missing.png": (None, "no such image"),
        "empty.jpg": (b"", "empty"),
        "text.png": (b"this is no image at all", "not an image"),
        "cut.jpg": (photo[: len(photo) // 2], "corrupt or truncated"),
        "cut.png": (png[: len(png) // 2], "corrupt or truncated"),
        "header.png": (png[:20], "image"),
        "broken.png": (bytes(broken_png), "corrupt or truncated"),
        "bomb.png": (encoded(Image.new("1", (3000, 2000)), "PNG"), "decompression bomb"),
        "bomb_for_pillow.png": (encoded(Image.new("1", (20_000, 10_000)), "PNG"), "decompression bomb"),
        "float.tiff": (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "no agreed range"),
        "thin.png": (encoded(Image.new("RGB", (201, 1)), "PNG"), "aspect ratio"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_file_is_named(name: str, tmp_path: Path) -> None:
    content, message = bad_files()[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    limited = ImageProcessor(max_source_pixels=5_000_000)
    with pytest.raises(ValueError, match=message) as caught:
        limited(path)
    assert str(path) in str(caught.value)
    if content:
        with pytest.raises(ValueError, match=message) as caught:
            limited(content, name="row 7 of the table")
        assert "row 7 of the table" in str(caught.value)


@pytest.mark.parametrize(
    "source,message",
    [
        (b"", "0 bytes"),
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((3, 40, 40), np.uint8), "channels last"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (Image.new("RGB", (0, 5)), "empty"),
        ("https://example.com/a.png", "not downloaded"),
        (7, "not int"),
        (np.zeros((3000, 2000), np.uint8), "decompression bomb"),
    ],
)
def test_bad_sources_in_memory(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_image(source, max_pixels=5_000_000)
    with pytest.raises(ValueError, match="place 3"):
        decode_image(source, max_pixels=5_000_000, name="place 3")
