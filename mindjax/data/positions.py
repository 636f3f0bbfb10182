"""M-RoPE positions of a token sequence with images and video frames.

The rule is transformers' `Qwen3VLModel.get_rope_index`: text counts up alike on all three axes; the tokens of an image
or a frame stand at (p, p + row, p + column); the text after it goes on at p + the longer side of its grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mindjax.data.processor import Processor


def modality_from_tokens(tokens: np.ndarray, processor: Processor) -> np.ndarray:
    """[T] int8: 0 text, 1 image, 2 video."""
    return (tokens == processor.image_token_id) * np.int8(1) + (tokens == processor.video_token_id) * np.int8(2)


def positions_from_tokens(tokens: np.ndarray, grids: Sequence[tuple[int, int]], processor: Processor) -> np.ndarray:
    """The positions of expanded tokens, of a prompt alone or with what was sampled after it.

    Args:
      tokens: [T] int32, placeholders expanded.
      grids: (rows, columns) in patches, one per image and per video frame (temporal patch), in token order.
      processor: says which tokens are placeholders and how many patches make one.

    Returns:
      [T, 3] int32, (time, height, width). The token after the last stands at `positions.max() + 1`.

    Raises:
      ValueError: the runs of placeholders do not fit the grids.
    """
    tokens = np.asarray(tokens)
    modality = modality_from_tokens(tokens, processor)
    merge = processor.merge_size
    positions = np.empty((len(tokens), 3), np.int32)
    bounds = np.flatnonzero(np.diff(modality)) + 1
    starts, ends = [0, *bounds], [*bounds, len(tokens)]
    images = sum(1 for start in starts if start < len(tokens) and modality[start])
    if images != len(grids):
        raise ValueError(
            f"the tokens hold {images} runs of image or video placeholders, but there are {len(grids)} grids"
        )
    following, remaining = 0, iter(grids)
    for start, end in zip(starts, ends, strict=True):
        if start == end:
            continue
        if not modality[start]:
            positions[start:end] = np.arange(following, following + end - start)[:, None]
            following += end - start
            continue
        grid = next(remaining)
        rows, columns = grid[0] // merge, grid[1] // merge
        if rows * columns != end - start:
            raise ValueError(
                f"{end - start} placeholders from token {start} on, but a grid of {grid[0]} x {grid[1]} patches "
                f"makes {rows * columns} tokens"
            )
        positions[start:end, 0] = following
        positions[start:end, 1] = following + np.repeat(np.arange(rows), columns)
        positions[start:end, 2] = following + np.tile(np.arange(columns), rows)
        following += max(rows, columns)
    return positions
