"""The environment of MGPO (arXiv:2507.05920): two turns, first a box, then an answer on what the box shows.

The policy gets the picture shrunk to a few tokens and says where it wants to look; the environment cuts that from the
original pixels. The box is in pixels of the picture as it was shown, as in the paper, which maps it by the ratio of the
two sizes. The arms to compare with replace the policy's box, or ask at once with as many visual tokens in one picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from mindjax.data.images import decode_image
from mindjax.data.packing import SampleSize
from mindjax.data.processor import Processor
from mindjax.rl.crop_tool import Box, CropRules, View, crop_tool, from_original
from mindjax.rl.environments import Environment, Message, Step, message_size, pictures
from mindjax.rl.tools import InvalidCall, Toolbox
from mindjax.types import Sample

# learned  the policy's box is cut
# random   a box of the usual size anywhere, whatever the policy said
# oracle   a box of the usual size about the answer's own box, whatever the policy said
# alone    no box and no crop: one picture of as many tokens as the others see in two
Arm = Literal["learned", "random", "oracle", "alone"]

ASK_BOX = "First give its box."
_BOX = re.compile(r"\s*(\d{1,4}),(\d{1,4}),(\d{1,4}),(\d{1,4})\s*")


@dataclass(frozen=True)
class Looking:
    """What is shown, and how large.

    Attributes:
      whole_tokens, crop_tokens: visual tokens of the shrunken picture and of a crop; "alone" gets the sum in one.
      token_side: pixels a side that a token shows, patch size times merge size.
      crop_side: pixels of the original, of the boxes of "random" and "oracle".
      rules: see `CropRules`.
      jitter: pixels of the original by which the boxes of "oracle" are off at most, on each axis.
    """

    whole_tokens: int
    crop_tokens: int
    token_side: int
    crop_side: int
    rules: CropRules = field(default_factory=CropRules)
    jitter: float = 0.0

    def environment(self, arm: Arm, processor: Processor, question: str) -> Environment:
        """The arm's environment, for samples whose one picture has about as many pixels on each side.

        Args:
          arm: see `Arm`.
          processor: must let pictures of all these sizes pass as they are.
          question: the longest one, which bounds the shapes.
        """
        sizes = [self.whole_tokens + self.crop_tokens] if arm == "alone" else [self.whole_tokens, self.crop_tokens]
        limit = max(sizes) * self.token_side**2
        if processor.image.max_pixels < limit or processor.image.min_pixels > self.token_side**2:
            raise ValueError(
                f"the processor resizes what is shown here: it lets {processor.image.min_pixels} to "
                f"{processor.image.max_pixels} pixels pass, and must let {self.token_side**2} to {limit}"
            )
        side = self.token_side
        square = np.zeros((side, side, 3), np.uint8)
        shown = message_size(self.answer(square, question), processor)  # one token of picture
        patches = self.crop_tokens * processor.merge_size**2
        refused = message_size(self.refusal("x" * 200, question), processor)
        largest = SampleSize(max(shown.tokens + self.crop_tokens - 1, refused.tokens), (patches,))
        return Environment(lambda rng: LookOnce(self, arm, rng), 1 if arm == "alone" else 2, largest)

    def view(self, pixels: np.ndarray, tokens: int) -> np.ndarray:
        """The picture [H, W, 3], larger or smaller, on at most so many tokens; about its own shape, and of those
        shapes the one of most tokens."""
        height, width = pixels.shape[:2]
        scale = math.sqrt(tokens / (height * width))
        # No side takes more than all tokens: a thin picture is one token wide.
        rows = min(max(1, math.floor(height * scale + 1e-9)), tokens)
        columns = min(max(1, math.floor(width * scale + 1e-9)), tokens // rows)
        if (rows + 1) * columns <= tokens and height >= width:
            rows += 1
        elif rows * (columns + 1) <= tokens:
            columns += 1
        size = columns * self.token_side, rows * self.token_side
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))

    def answer(self, crop: np.ndarray, question: str) -> Message:
        """What follows a box: the crop, and the question again."""
        parts = [{"type": "image", "image": self.view(crop, self.crop_tokens)}, {"type": "text", "text": question}]
        return {"role": "user", "content": parts}

    def refusal(self, reason: str, question: str) -> Message:
        """What follows something that is no box: the question must be answered without a crop."""
        return {"role": "user", "content": f"No picture: {reason}. {question}"}


class LookOnce:
    """One conversation; see the module.

    Args:
      looking: see `Looking`.
      arm: see `Arm`.
      rng: for the boxes of "random", and the jitter of "oracle".
    """

    def __init__(self, looking: Looking, arm: Arm, rng: np.random.Generator):
        self.looking, self.arm, self.rng = looking, arm, rng
        self.toolbox = Toolbox([crop_tool(looking.rules)])
        self.state: dict[str, Any] = {}
        self.question, self.box, self.looked = "", None, False

    def reset(self, sample: Sample) -> Sequence[Message]:
        """The shrunken picture and the question of the sample's first message.

        Raises:
          ValueError: the arm is "oracle" and the sample's answer has no box.
        """
        (image,) = pictures(sample.messages[:1])
        self.question = sample.messages[0]["content"][-1]["text"]
        self.looked = self.arm == "alone"
        self.box = None if sample.answer is None else sample.answer.get("box")
        if self.arm == "oracle" and self.box is None:
            raise ValueError(f"sample {sample.id!r}: the arm 'oracle' needs an answer with a box")
        original, looking = decode_image(image), self.looking
        tokens = looking.whole_tokens + (looking.crop_tokens if self.arm == "alone" else 0)
        shown = looking.view(original, tokens)
        height, width = original.shape[:2]
        view = View((0.0, 0.0, float(width), float(height)), (shown.shape[0], shown.shape[1]))
        self.state = {"original": original, "views": [view]}
        text = self.question if self.arm == "alone" else f"{self.question} {ASK_BOX}"
        return ({"role": "user", "content": [{"type": "image", "image": shown}, {"type": "text", "text": text}]},)

    def step(self, text: str) -> Step:
        if self.looked:
            return Step()
        self.looked = True
        try:
            call = self.call(text)
            crop = self.toolbox.call(self.state, "crop", call)
        except InvalidCall as error:
            return Step(self.looking.refusal(str(error), self.question), frozenset({"invalid"}))
        return Step(self.looking.answer(crop.pixels, self.question))

    def call(self, text: str) -> dict[str, Any]:
        """The arguments of the crop tool."""
        height, width = self.state["original"].shape[:2]
        side = self.looking.crop_side
        if self.arm == "learned":
            return {"box": parse_box(text), "frame": "shown", "source": 0}
        if self.arm == "random":
            left, top = self.rng.uniform(0, width - side), self.rng.uniform(0, height - side)
        else:
            assert self.box is not None
            off = self.rng.uniform(-self.looking.jitter, self.looking.jitter, 2)
            left = (self.box[0] + self.box[2] - side) / 2 + off[0]
            top = (self.box[1] + self.box[3] - side) / 2 + off[1]
        return {"box": [left, top, left + side, top + side], "frame": "pixels"}


def parse_box(text: str) -> list[int]:
    """The box in a turn of the policy, "left,top,right,bottom" and nothing else.

    Raises:
      InvalidCall: there is none.
    """
    match = _BOX.fullmatch(text[:100])
    if match is None:
        raise InvalidCall("a box is left,top,right,bottom")
    return [int(edge) for edge in match.groups()]


def demonstration(sample: Sample, looking: Looking, rng: np.random.Generator, spread: float) -> Sample:
    """A conversation of two turns that shows the form: a box somewhere near, a crop about the right place, the answer.

    The box that is said is off by up to `spread` pixels of the original on each axis, all of it alike, so that there is
    something left to learn from rewards. The crop that follows is that of the arm "oracle", and teaches to read.

    Args:
      sample: with a box in its answer.
      looking: see `Looking`.
      rng: for all of this.
      spread: see above.
    """
    env = LookOnce(looking, "oracle", rng)
    (first,) = env.reset(sample)
    assert env.box is not None
    view, original = env.state["views"][0], env.state["original"]
    size = (original.shape[0], original.shape[1])
    half, off = looking.crop_side / 2, rng.uniform(-spread, spread, 2)
    x, y = (env.box[0] + env.box[2]) / 2 + off[0], (env.box[1] + env.box[3]) / 2 + off[1]
    box = from_original((x - half, y - half, x + half, y + half), "shown", view, size)
    second = env.step(box_text(box, view.shown)).message
    assert second is not None, "a box of the usual size about the answer can always be cut"
    boxed = {"role": "assistant", "content": box_text(box, view.shown)}
    return replace(sample, messages=(dict(first), boxed, dict(second), sample.messages[-1]))


def box_text(box: Box, shown: tuple[int, int]) -> str:
    """A box in the frame "shown" as the policy writes it: whole pixels, moved inside, with as many digits each."""
    digits = len(str(max(shown)))
    edges = []
    for axis, limit in ((0, shown[1]), (1, shown[0])):
        length = round(box[axis + 2] - box[axis])
        low = min(max(round(box[axis]), 0), limit - length)
        edges.append((low, low + length))
    (left, right), (top, bottom) = edges
    return ",".join(f"{edge:0{digits}d}" for edge in (left, top, right, bottom))
