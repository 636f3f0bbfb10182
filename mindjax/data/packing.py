"""Packing: which conversations share a row, decided from lengths alone, and the arrays that follow.

`plan` assigns samples to groups of rows; a group is one micro-batch of one static `BatchShape`. It knows lengths
and a seed, nothing else, so every process computes the same plan and a data position is one integer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mindjax.config import VisionConfig
from mindjax.types import Batch, VisionInputs

if TYPE_CHECKING:
    from mindjax.data.render import Rendered

# Candidates looked at, per row of a group, to fill what the next ones in order leave free: more packs tighter,
# fewer keeps closer to the given order.
LOOKAHEAD_PER_ROW = 16


@dataclass(frozen=True)
class BatchShape:
    """The static shape of a packed micro-batch; one compiled step serves one shape.

    Attributes:
      rows: token rows.
      length: tokens in a row.
      vision_rows: patch rows, 0 for text alone.
      vision_length: patches in a patch row; a whole image or frame lies in one row, and attention costs its square.
      patch_dim: numbers in a patch.
      merge_size: side of the square of patches that becomes one token.
    """

    rows: int
    length: int
    vision_rows: int = 0
    vision_length: int = 0
    patch_dim: int = 1536
    merge_size: int = 2

    def __post_init__(self) -> None:
        if self.rows < 1 or self.length < 1:
            raise ValueError(f"a batch needs at least one row and one token, not {self.rows} x {self.length}")
        if (self.vision_rows > 0) != (self.vision_length > 0) or self.vision_length % self.merge_size**2:
            raise ValueError(
                f"vision is {self.vision_rows} rows of {self.vision_length} patches: set both or neither, "
                f"and the length to a multiple of {self.merge_size**2} (merge_size squared)"
            )

    @classmethod
    def for_sizes(cls, sizes: Sequence[SampleSize], rows: int, vision: VisionConfig, *, length: int = 0) -> BatchShape:
        """The smallest bucket that holds every sample, with patch rows in proportion to what the samples need.

        Args:
          sizes: of all samples; few distinct maxima give few distinct shapes, for all sides are rounded to buckets.
          rows: token rows.
          vision: gives patch and merge sizes.
          length: tokens in a row, at least the longest sample; 0 chooses the bucket of the longest.
        """
        if not sizes:
            raise ValueError("there are no samples to choose a batch shape for")
        length = length or bucket(max(size.tokens for size in sizes))
        shape = {"patch_dim": vision.patch_dim, "merge_size": vision.spatial_merge_size}
        largest = max((frame for size in sizes for frame in size.frames), default=0)
        if not largest:
            return cls(rows, length, **shape)
        vision_length = bucket(largest, vision.merge_unit * 4)
        # A frame takes the share of a patch row that its length allows; frames come with tokens, so full token rows
        # bring the average number of them, and at least the sample with most must fit.
        shares = [sum(1 / (vision_length // frame) for frame in size.frames) for size in sizes]
        average = rows * length * sum(shares) / sum(size.tokens for size in sizes)
        most = max(len(size.frames) for size in sizes) / (vision_length // largest)
        return cls(rows, length, bucket(int(np.ceil(max(average, most))), 1), vision_length, **shape)


@dataclass(frozen=True)
class SampleSize:
    """What a plan needs to know of a sample: its tokens, and the patches of each of its images and frames."""

    tokens: int
    frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A deterministic assignment of samples to rows.

    Attributes:
      groups: groups[g][row] are the indices of the samples in that row, in order.
      dropped: indices of the samples that fit no row (empty unless the caller allowed it).
    """

    groups: tuple[tuple[tuple[int, ...], ...], ...]
    dropped: tuple[int, ...] = ()

    def fill(self, sizes: Sequence[SampleSize], shape: BatchShape) -> float:
        """The share of token places that hold a token."""
        tokens = sum(sizes[i].tokens for group in self.groups for row in group for i in row)
        return tokens / max(1, len(self.groups) * shape.rows * shape.length)


def bucket(value: int, smallest: int = 64) -> int:
    """Rounds up to a power of two or one and a half of it (64, 96, 128, 192, ...), so that few shapes exist."""
    size = smallest
    while size < value:
        if size % 2 == 0 and 3 * size // 2 >= value:
            return 3 * size // 2
        size *= 2
    return size


def size_of(rendered: Rendered) -> SampleSize:
    """The lengths of a rendered conversation."""
    return SampleSize(len(rendered.tokens), tuple(len(patches) for patches, _ in rendered.frames))


def epoch_order(
    count: int,
    *,
    seed: int,
    epoch: int,
    difficulty: Sequence[float] | None = None,
    repeats: Sequence[float] | None = None,
) -> np.ndarray:
    """The order in which samples are offered to rows.

    Args:
      count: number of samples.
      seed, epoch: of the shuffle.
      difficulty: per sample; they come in rising order, equal ones shuffled.
      repeats: mean occurrences of each sample per epoch (a mixture); after E epochs sample i has come
        floor(E x repeats[i]) or one more times, so shares are exact, not drawn.

    Returns:
      indices, int64.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(count)
    if repeats is not None:
        weights = np.asarray(repeats, np.float64)
        if weights.shape != (count,) or not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError(f"repeats must be {count} finite numbers >= 0, one per sample")
        # The same phase in every epoch, so that the fractions of successive epochs add up.
        phase = np.random.default_rng((seed, 1 << 20)).random(count)
        times = np.floor((epoch + 1) * weights + phase) - np.floor(epoch * weights + phase)
        order = rng.permutation(np.repeat(np.arange(count), times.astype(np.int64)))
    if difficulty is not None:
        levels = np.asarray(difficulty, np.float64)
        if levels.shape != (count,) or np.isnan(levels).any():
            raise ValueError(f"difficulty must be {count} numbers, one per sample")
        order = order[np.argsort(levels[order], kind="stable")]
    return order


def plan(
    sizes: Sequence[SampleSize],
    shape: BatchShape,
    *,
    seed: int = 0,
    epoch: int = 0,
    difficulty: Sequence[float] | None = None,
    repeats: Sequence[float] | None = None,
    drop_too_long: bool = False,
) -> Plan:
    """Assigns the samples of one epoch to groups of rows; every sample that the epoch offers is in exactly one row.

    The next sample in order always opens a group; the ones after it, within a bounded lookahead, fill it by best
    fit. So the order is kept up to about a group, and no sample waits for ever.

    Args:
      sizes: of the samples.
      shape: of a group; vision rows are shared by its token rows.
      seed, epoch, difficulty, repeats: see `epoch_order`.
      drop_too_long: whether samples that fit no row are left out and listed, instead of being an error. They are
        never cut: a cut conversation would lose image places but not images.

    Raises:
      ValueError: a sample does not fit an empty group, and `drop_too_long` is off.
    """
    too_long = [i for i, size in enumerate(sizes) if not _fits_alone(size, shape)]
    if too_long and not drop_too_long:
        worst = max((sizes[i] for i in too_long), key=lambda size: (size.tokens, max(size.frames, default=0)))
        raise ValueError(
            f"{len(too_long)} of {len(sizes)} samples (first: index {too_long[0]}) do not fit rows of {shape.length} "
            f"tokens and {shape.vision_rows} x {shape.vision_length} patches; the largest has {worst.tokens} tokens "
            f"and images of {worst.frames} patches. Give a larger shape, lower max_pixels, or set drop_too_long."
        )
    excluded = set(too_long)
    order = epoch_order(len(sizes), seed=seed, epoch=epoch, difficulty=difficulty, repeats=repeats)
    pending = deque(int(i) for i in order if int(i) not in excluded)
    lookahead = LOOKAHEAD_PER_ROW * shape.rows
    groups = []
    while pending:
        window = [pending.popleft() for _ in range(min(lookahead, len(pending)))]
        rows, left = _fill_group(window, sizes, shape)
        pending.extendleft(reversed(left))
        groups.append(rows)
    return Plan(tuple(groups), tuple(too_long))


def _fits_alone(size: SampleSize, shape: BatchShape) -> bool:
    return 0 < size.tokens <= shape.length and _place_frames(size.frames, shape) is not None


def _fill_group(
    window: Sequence[int], sizes: Sequence[SampleSize], shape: BatchShape
) -> tuple[tuple[tuple[int, ...], ...], list[int]]:
    """Rows filled from the window by best fit, and the samples that found no place, in order."""
    rows: list[list[int]] = [[] for _ in range(shape.rows)]
    free = [shape.length] * shape.rows
    frames: list[int] = []
    left: list[int] = []
    shortest = min(sizes[i].tokens for i in window)
    for position, i in enumerate(window):
        size = sizes[i]
        if max(free) < shortest:
            left.extend(window[position:])
            break
        fitting = [(space, row) for row, space in enumerate(free) if space >= size.tokens]
        if not fitting or (size.frames and _place_frames([*frames, *size.frames], shape) is None):
            left.append(i)
            continue
        row = min(fitting)[1]
        rows[row].append(i)
        free[row] -= size.tokens
        frames.extend(size.frames)
    return tuple(tuple(row) for row in rows), left


def _place_frames(lengths: Sequence[int], shape: BatchShape) -> list[tuple[int, int]] | None:
    """(row, offset) of each frame by first fit of the longest first, or None where they do not all fit.

    Whether they fit depends on the lengths as a multiset alone, so that what `plan` found to fit also fits when
    `pack` meets the same frames in another order.
    """
    unit = shape.merge_size**2
    if sum(lengths) > shape.vision_rows * shape.vision_length or any(n <= 0 or n % unit for n in lengths):
        return None
    free = [shape.vision_length] * shape.vision_rows
    # Equal lengths fill one row after the other, so one pass over the rows serves all of a length.
    slots: dict[int, list[tuple[int, int]]] = {}
    for length, count in sorted(Counter(lengths).items(), reverse=True):
        places: list[tuple[int, int]] = []
        for row in range(shape.vision_rows):
            take = min(count - len(places), free[row] // length)
            places += [(row, shape.vision_length - free[row] + k * length) for k in range(take)]
            free[row] -= take * length
            if len(places) == count:
                break
        if len(places) < count:
            return None
        slots[length] = places[::-1]
    return [slots[length].pop() for length in lengths]


def pack(rows: Sequence[Sequence[Rendered]], shape: BatchShape) -> Batch:
    """Lays rendered conversations into rows; the j-th conversation of a row gets segment id j + 1.

    Frames whose patches are the same array object are stored, and later encoded, once: give the answers to one
    prompt the frames of that prompt, and the image is paid for once.

    Args:
      rows: at most `shape.rows` lists; missing rows are padding.
      shape: of the result.

    Returns:
      A Batch of NumPy arrays; the first token of each segment is no target, whatever its mask said.

    Raises:
      ValueError: a row or the frames do not fit, or a conversation's image places and patches disagree.
    """
    b, t, unit = shape.rows, shape.length, shape.merge_size**2
    if len(rows) > b:
        raise ValueError(f"{len(rows)} rows do not fit a batch of {b}")
    unique = {id(patches): (patches, grid) for row in rows for item in row for patches, grid in item.frames}
    places = _place_frames([len(patches) for patches, _ in unique.values()], shape)
    if places is None:
        lengths = sorted((len(patches) for patches, _ in unique.values()), reverse=True)
        raise ValueError(
            f"{len(lengths)} images or frames of {lengths[:8]}{'...' if len(lengths) > 8 else ''} patches do not fit "
            f"{shape.vision_rows} rows of {shape.vision_length} patches"
        )
    place_of = dict(zip(unique, places, strict=True))

    # Any: NumPy arrays, which stand for JAX's until a step places them.
    tokens: Any = np.zeros((b, t), np.int32)
    segment_ids: Any = np.zeros((b, t), np.int32)
    positions: Any = np.zeros((b, t, 3), np.int32)
    loss_mask: Any = np.zeros((b, t), np.float32)
    vision_index: Any = np.full((b, t), -1, np.int32)
    for row, items in enumerate(rows):
        start = 0
        for segment, item in enumerate(items, 1):
            end = start + len(item.tokens)
            if end > t:
                raise ValueError(f"row {row} holds {sum(len(i.tokens) for i in items)} tokens, the batch has {t}")
            tokens[row, start:end] = item.tokens
            positions[row, start:end] = item.positions
            segment_ids[row, start:end] = segment
            loss_mask[row, start:end] = item.loss_mask
            loss_mask[row, start] = 0.0
            features = [
                (place[0] * shape.vision_length + place[1]) // unit + np.arange(len(patches) // unit, dtype=np.int32)
                for patches, _ in item.frames
                for place in [place_of[id(patches)]]
            ]
            (at,) = np.nonzero(item.modality)
            if len(at) != sum(map(len, features)):
                raise ValueError(
                    f"a conversation has {len(at)} image places but images of {sum(map(len, features))} tokens; "
                    "it was cut, or its images were, after rendering"
                )
            if features:
                vision_index[row, start + at] = np.concatenate(features)
            start = end
    vision = _pack_vision([(*unique[key], place_of[key]) for key in unique], shape) if shape.vision_rows else None
    return Batch(tokens, positions, segment_ids, loss_mask, vision_index, vision)


def _pack_vision(
    frames: Sequence[tuple[np.ndarray, tuple[int, int], tuple[int, int]]], shape: BatchShape
) -> VisionInputs:
    """Patches, coordinates and segment ids of frames (patches, grid, place), each vision row numbered from 1."""
    r, length = shape.vision_rows, shape.vision_length
    patches: Any = np.zeros((r, length, shape.patch_dim), np.float32)
    coordinates: Any = np.zeros((r, length, 4), np.int32)
    segment_ids: Any = np.zeros((r, length), np.int32)
    next_id = [1] * r
    for pixels, (height, width), (row, start) in frames:
        if pixels.shape != (height * width, shape.patch_dim):
            raise ValueError(
                f"patches of shape {pixels.shape} do not match a grid of {height} x {width} and patches of "
                f"{shape.patch_dim} numbers"
            )
        end = start + len(pixels)
        patches[row, start:end] = pixels
        coordinates[row, start:end] = patch_coordinates(height, width, shape.merge_size)
        segment_ids[row, start:end] = next_id[row]
        next_id[row] += 1
    return VisionInputs(patches, coordinates, segment_ids)


@lru_cache(maxsize=4096)
def patch_coordinates(height: int, width: int, merge_size: int) -> np.ndarray:
    """[height x width, 4] int32 (row, column, height, width) in the order of the processor: the squares of patches
    that become one token, row by row, and inside each its patches, row by row."""
    if height % merge_size or width % merge_size:
        raise ValueError(f"a grid of {height} x {width} patches is no multiple of the merge size {merge_size}")
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    blocks = grid.reshape(height // merge_size, merge_size, width // merge_size, merge_size, 2)
    place = blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    result = np.concatenate([place, np.broadcast_to([height, width], place.shape)], axis=1).astype(np.int32)
    result.flags.writeable = False
    return result


def collate_prompts(
    prompts: Sequence[Rendered],
    length: int | None = None,
    *,
    rows: int | None = None,
    vision_rows: int | None = None,
    vision_length: int | None = None,
    merge_size: int = 2,
    patch_dim: int | None = None,
) -> Batch:
    """One prompt per row, right-padded, for the sampler; `loss_mask` is that of the prompts.

    Whatever is not given is the smallest bucket that holds the prompts.

    Raises:
      ValueError: the prompts do not fit what was given.
    """
    if not prompts:
        raise ValueError("there are no prompts to collate")
    frames = {id(patches): patches for prompt in prompts for patches, _ in prompt.frames}
    lengths = [len(patches) for patches in frames.values()]
    if frames:
        patch_dim = next(iter(frames.values())).shape[1]
    elif vision_rows and not patch_dim:
        raise ValueError("text alone does not tell the size of a patch: give patch_dim beside vision_rows")
    rows = rows or len(prompts)
    length = length or bucket(max(len(prompt.tokens) for prompt in prompts))
    if vision_length is None:
        vision_length = bucket(max(lengths), 4 * merge_size**2) if lengths else 0
    if vision_rows is None:
        roomy = BatchShape(rows, length, len(lengths), vision_length if lengths else 0, merge_size=merge_size)
        places = _place_frames(lengths, roomy)
        if places is None:
            raise ValueError(f"an image of {max(lengths)} patches does not fit a row of {vision_length}")
        vision_rows = bucket(max(row for row, _ in places) + 1, 1) if places else 0
    shape = BatchShape(rows, length, vision_rows, vision_length if vision_rows else 0, patch_dim or 1, merge_size)
    return pack([[prompt] for prompt in prompts], shape)
