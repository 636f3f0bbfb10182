"""A closer look: boxes in a stated frame, mapped to the original's pixels and cut from them.

A box is (left, top, right, bottom): edges, not pixel centres, x to the right and y down, so that a picture W wide spans
0 to W. Everything is float64 up to the cut. A crop of a crop is a crop of the original.

What becomes of a box, in this order:
 1. It must be four finite numbers with left < right and top < bottom, in a named frame.
 2. It is mapped to the original, and clamped to the picture that it refers to.
 3. Its edges go outward to whole pixels.
 4. A side below `min_side` grows about its middle, and moves inward where the picture ends.
 5. Where it is longer than `max_aspect` times its width, the short side grows likewise.
A box that is empty after 2, or cannot grow enough in 5, is refused with the reason, as is one that breaks 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from mindjax.data.images import decode_image
from mindjax.data.packing import SampleSize
from mindjax.data.processor import Processor
from mindjax.rl.environments import Environment, Message, Step, message_size, pictures
from mindjax.rl.tools import MAX_ANSWER, Access, InvalidCall, Tool, Toolbox, parse_call
from mindjax.types import Sample

# pixels      of the original
# normalised  0 to 1000 over the original, on each axis
# local       0 to 1000 over one picture that was shown, the original or a crop
# shown       pixels of one picture as the model got it, after resizing (MGPO, arXiv:2507.05920)
Frame = Literal["pixels", "normalised", "local", "shown"]
FRAMES: tuple[Frame, ...] = get_args(Frame)
SCALE = 1000.0

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """A picture that the policy has seen.

    Attributes:
      region: which part of the original it shows, in its pixels.
      shown: (height, width) at which the model got it.
    """

    region: Box
    shown: tuple[int, int]


def to_original(box: Sequence[float], frame: Frame, view: View, size: tuple[int, int]) -> Box:
    """A box in a frame to pixels of the original, float64, nothing clamped or rounded.

    Args:
      box: (left, top, right, bottom).
      frame: see `Frame`; "local" and "shown" refer to `view`.
      view: one picture that was shown.
      size: (height, width) of the original.
    """
    (left, top), (x, y) = _origin_and_unit(frame, view, size)
    return left + box[0] * x, top + box[1] * y, left + box[2] * x, top + box[3] * y


def from_original(box: Sequence[float], frame: Frame, view: View, size: tuple[int, int]) -> Box:
    """The inverse of `to_original`."""
    (left, top), (x, y) = _origin_and_unit(frame, view, size)
    return (box[0] - left) / x, (box[1] - top) / y, (box[2] - left) / x, (box[3] - top) / y


def _origin_and_unit(
    frame: Frame, view: View, size: tuple[int, int]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where (0, 0) of a frame lies in the original, and how many of its pixels one unit is, on each axis."""
    left, top, right, bottom = view.region
    match frame:
        case "pixels":
            return (0.0, 0.0), (1.0, 1.0)
        case "normalised":
            return (0.0, 0.0), (size[1] / SCALE, size[0] / SCALE)
        case "local":
            return (left, top), ((right - left) / SCALE, (bottom - top) / SCALE)
        case "shown":
            return (left, top), ((right - left) / view.shown[1], (bottom - top) / view.shown[0])
    raise InvalidCall(f"there is no frame {frame!r}; name one of {', '.join(FRAMES)}")


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int beyond float64
        return False


@dataclass(frozen=True)
class CropRules:
    """Bounds on crops.

    Attributes:
      min_side: pixels of the original; a shorter side grows to it, or to the whole picture.
      max_aspect: longer side over shorter.
    """

    min_side: int = 28
    max_aspect: float = 4.0

    def __post_init__(self) -> None:
        if self.min_side < 1 or self.max_aspect < 1:
            raise ValueError(
                f"crops need min_side and max_aspect of at least 1, not {self.min_side} and {self.max_aspect}"
            )

    def region(
        self, box: Sequence[float], frame: Frame, view: View, size: tuple[int, int]
    ) -> tuple[int, int, int, int]:
        """The whole pixels (left, top, right, bottom) of the original that a box asks for; the rules are above.

        Raises:
          InvalidCall: the box is refused.
        """
        if len(box) != 4 or not all(map(_finite, box)):
            raise InvalidCall("a box is four finite numbers: left, top, right, bottom")
        if not (box[0] < box[2] and box[1] < box[3]):
            raise InvalidCall("a box goes from left to right and from top to bottom: left < right and top < bottom")
        whole: Box = (0.0, 0.0, float(size[1]), float(size[0]))
        bounds = view.region if frame in ("local", "shown") else whole
        mapped = to_original(box, frame, view, size)
        spans = [
            self._whole(max(mapped[axis], bounds[axis]), min(mapped[axis + 2], bounds[axis + 2]), axis, bounds)
            for axis in (0, 1)
        ]
        for axis in (0, 1):
            wanted = math.ceil((spans[1 - axis][1] - spans[1 - axis][0]) / self.max_aspect - _ROUNDING)
            spans[axis] = _grow(spans[axis], wanted, int(bounds[axis]), int(bounds[axis + 2]))
            if spans[axis][1] - spans[axis][0] < wanted:
                raise InvalidCall(f"the box is too thin: a side may be at most {self.max_aspect:g} times the other")
        (left, right), (top, bottom) = spans
        return left, top, right, bottom

    def _whole(self, low: float, high: float, axis: int, bounds: Sequence[float]) -> tuple[int, int]:
        """One side, already clamped, in whole pixels and long enough."""
        if low >= high:
            raise InvalidCall("the box lies outside of the picture that it refers to")
        span = math.floor(low + _ROUNDING), math.ceil(high - _ROUNDING)
        return _grow(span, self.min_side, int(bounds[axis]), int(bounds[axis + 2]))


# Pixels: an edge that is whole but for the rounding of the mapping is taken as whole.
_ROUNDING = 1e-6


def _grow(span: tuple[int, int], wanted: int, low: int, high: int) -> tuple[int, int]:
    """The span, at least `wanted` long about its middle, inside low and high; all of these where that is too little."""
    missing = min(wanted, high - low) - (span[1] - span[0])
    if missing <= 0:
        return span
    start = min(max(span[0] - missing // 2, low), high - (span[1] - span[0]) - missing)
    return start, start + (span[1] - span[0]) + missing


@dataclass(frozen=True)
class Crop:
    """What the tool gives back: which pixels (left, top, right, bottom), and these, [H, W, 3] uint8."""

    region: tuple[int, int, int, int]
    pixels: np.ndarray


def crop_tool(rules: CropRules) -> Tool:
    """The tool; its state is {"original": pixels [H, W, 3], "views": [View]}, the first view being the original."""

    def run(state: Any, arguments: Mapping[str, Any]) -> Crop:
        frame, source = arguments["frame"], arguments.get("source")
        if frame in ("local", "shown") and source is None:
            raise InvalidCall(f"frame {frame!r} refers to one picture: give its number as source, 0 for the first")
        number = int(source or 0)  # JSON schema calls 1.0 an integer
        if number >= len(state["views"]):
            raise InvalidCall(f"there is no picture of that number; the last one is {len(state['views']) - 1}")
        original = state["original"]
        region = rules.region(arguments["box"], frame, state["views"][number], original.shape[:2])
        left, top, right, bottom = region
        return Crop(region, original[top:bottom, left:right].copy())

    schema = {
        "type": "object",
        "properties": {
            "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
            "frame": {"enum": list(FRAMES)},
            "source": {"type": "integer", "minimum": 0},
        },
        "required": ["box", "frame"],
        "additionalProperties": False,
    }
    description = (
        "Shows a part of a picture in full resolution. box: [left, top, right, bottom]. frame: what its numbers are, "
        "'pixels' of the original, 'normalised' 0 to 1000 over the original, 'local' 0 to 1000 over the picture "
        "number source, or 'shown' pixels of that picture."
    )
    return Tool("crop", schema, Access.READ, run, description)


@dataclass
class CropEnv:
    """Calls of the crop tool, answered by crops, until the policy says something without a call.

    A call that cannot be done is answered by the reason, and flagged "invalid"; it uses up a turn.

    Attributes:
      size_shown: (height, width) of pixels -> the size at which the model gets them, `Processor.image.target_size`.
      rules: of the crops.
    """

    size_shown: Callable[[int, int], tuple[int, int]]
    rules: CropRules = field(default_factory=CropRules)

    def __post_init__(self) -> None:
        self.toolbox = Toolbox([crop_tool(self.rules)])
        self.state: dict[str, Any] = {}

    def reset(self, sample: Sample) -> Sequence[Message]:
        """The sample's conversation without its last reply; its first picture is the one that is cut.

        Raises:
          ValueError: it has no picture.
        """
        messages = sample.messages[:-1] if sample.messages[-1]["role"] == "assistant" else sample.messages
        images = pictures(messages)
        if not images:
            raise ValueError(f"sample {sample.id!r} has no picture to look at more closely")
        original = decode_image(images[0])
        height, width = original.shape[:2]
        view = View((0.0, 0.0, float(width), float(height)), self.size_shown(height, width))
        self.state = {"original": original, "views": [view]}
        return messages

    def step(self, text: str) -> Step:
        try:
            call = parse_call(text)
            if call is None:
                return Step()
            crop = self.toolbox.call(self.state, *call)
        except InvalidCall as error:
            return Step({"role": "tool", "content": f"Invalid call: {error}."}, frozenset({"invalid"}))
        left, top, right, bottom = crop.region
        view = View((left, top, right, bottom), self.size_shown(bottom - top, right - left))
        self.state["views"].append(view)
        text = f"Picture {len(self.state['views']) - 1}: pixels {list(crop.region)} of picture 0."
        parts = [{"type": "image", "image": crop.pixels}, {"type": "text", "text": text}]
        return Step({"role": "tool", "content": parts})


def crop_environment(processor: Processor, rules: CropRules, *, max_turns: int) -> Environment:
    """Conversations with the crop tool."""
    image = processor.image
    patches = image.max_pixels // (image.patch_size * image.merge_size) ** 2 * image.merge_size**2
    # No text is longer than the reason of a refusal, and a token is at least a byte.
    tokens = message_size({"role": "tool", "content": ""}, processor).tokens + len("Invalid call: .") + MAX_ANSWER
    largest = SampleSize(tokens + 2 + patches // image.merge_size**2, (patches,))
    tools = Toolbox([crop_tool(rules)]).definitions
    return Environment(lambda rng: CropEnv(image.target_size, rules), max_turns, largest, tools)
