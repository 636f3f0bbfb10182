"""Boxes in their frames: mapping against numbers worked out by hand, the rules on what may be cut, crops of crops."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindjax.data.packing import size_of
from mindjax.data.render import append_completion, append_message
from mindjax.data.samples import new_processor
from mindjax.rl.crop_tool import FRAMES, CropEnv, CropRules, View, crop_environment, from_original, to_original
from mindjax.rl.tools import InvalidCall
from mindjax.types import Sample
from tests.rl import tiny
from tests.train import tiny as shapes

EPS = 2.0**-52
SIZE = (768, 1024)  # height, width
WHOLE = View((0.0, 0.0, 1024.0, 768.0), (384, 512))
CROP = View((100.0, 50.0, 300.0, 150.0), (64, 128))  # 200 x 100 pixels, shown as 128 x 64
FREE = CropRules(min_side=1, max_aspect=1e9)


# --- mapping ---


@pytest.mark.parametrize(
    ("box", "frame", "view", "expected"),
    [
        ((10.5, 20.0, 30.0, 40.25), "pixels", CROP, (10.5, 20.0, 30.0, 40.25)),
        ((0, 0, 1000, 1000), "normalised", CROP, (0, 0, 1024, 768)),
        ((250, 500, 750, 625), "normalised", CROP, (256, 384, 768, 480)),
        ((0, 0, 1000, 1000), "local", CROP, (100, 50, 300, 150)),
        ((250, 100, 500, 900), "local", CROP, (150, 60, 200, 140)),
        ((125, 125, 250, 250), "local", WHOLE, (128, 96, 256, 192)),
        # MGPO: the picture was shown at half its size.
        ((100, 50, 200, 150), "shown", WHOLE, (200, 100, 400, 300)),
        # One shown pixel of the crop is 200 / 128 = 1.5625 pixels of the original, on both axes.
        ((0, 0, 128, 64), "shown", CROP, (100, 50, 300, 150)),
        ((32, 16, 64, 48), "shown", CROP, (150, 75, 200, 125)),
        ((-32, 0, 1, 1), "shown", CROP, (50, 50, 101.5625, 51.5625)),
    ],
)
def test_boxes_in_their_frames(box: Any, frame: Any, view: View, expected: Any) -> None:
    assert to_original(box, frame, view, SIZE) == expected
    np.testing.assert_allclose(from_original(expected, frame, view, SIZE), box, rtol=0, atol=1e-12)


EDGES = st.floats(-2000, 2000)
VIEWS = st.tuples(
    st.floats(0, 900),
    st.floats(0, 600),
    st.floats(1, 1000),
    st.floats(1, 800),
    st.integers(1, 2000),
    st.integers(1, 2000),
).map(lambda v: View((v[0], v[1], v[0] + v[2], v[1] + v[3]), (v[4], v[5])))


@settings(max_examples=120, deadline=None)
@given(st.tuples(EDGES, EDGES, EDGES, EDGES), st.sampled_from(FRAMES), VIEWS)
def test_mapping_there_and_back_is_exact_to_rounding(box: Any, frame: Any, view: View) -> None:
    there = to_original(box, frame, view, SIZE)
    # Backwards a rounding error of the original's pixels is divided by the size of a unit.
    unit = min((view.region[2] - view.region[0]) / 1000, (view.region[3] - view.region[1]) / 1000, 1 / 2000)
    bound = 4 * EPS * (max(map(abs, (*there, *view.region))) / unit + 2000)
    np.testing.assert_allclose(from_original(there, frame, view, SIZE), box, rtol=0, atol=bound)
    # Against exact arithmetic.
    left, top, right, bottom = map(Fraction, view.region)
    frames: dict[str, Any] = {
        "pixels": ((0, 0), (1, 1)),
        "normalised": ((0, 0), (Fraction(SIZE[1], 1000), Fraction(SIZE[0], 1000))),
        "local": ((left, top), ((right - left) / 1000, (bottom - top) / 1000)),
        "shown": ((left, top), ((right - left) / view.shown[1], (bottom - top) / view.shown[0])),
    }
    origin, units = frames[frame]
    for i, edge in enumerate(box):
        exact = Fraction(origin[i % 2]) + Fraction(edge) * Fraction(units[i % 2])
        assert abs(Fraction(there[i]) - exact) <= Fraction(4 * EPS) * (abs(exact) + 4000)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 1000)] * 4), min_size=1, max_size=4))
def test_crops_of_crops_agree_with_one_crop(boxes: Any) -> None:
    """Going down step by step gives the same pixels as the product of all maps, computed exactly."""
    view, exact = WHOLE, (Fraction(0), Fraction(0), Fraction(1024), Fraction(768))
    for box in boxes:
        box = (*(min(box[i], box[i + 2]) for i in (0, 1)), *(max(box[i], box[i + 2]) + 1 for i in (0, 1)))
        mapped = to_original(box, "local", view, SIZE)
        width, height = exact[2] - exact[0], exact[3] - exact[1]
        exact = (
            exact[0] + Fraction(box[0]) / 1000 * width, exact[1] + Fraction(box[1]) / 1000 * height,
            exact[0] + Fraction(box[2]) / 1000 * width, exact[1] + Fraction(box[3]) / 1000 * height,
        )  # fmt: skip
        np.testing.assert_allclose(mapped, [float(edge) for edge in exact], rtol=1e-12, atol=1e-9)
        view = View(mapped, (32, 32))


# --- what is cut ---


@pytest.mark.parametrize(
    ("box", "frame", "view", "rules", "expected"),
    [
        ((10, 20, 30, 40), "pixels", WHOLE, FREE, (10, 20, 30, 40)),
        ((10.2, 20.7, 29.1, 39.9), "pixels", WHOLE, FREE, (10, 20, 30, 40)),  # outward
        ((-50, -50, 40, 30), "pixels", WHOLE, FREE, (0, 0, 40, 30)),  # clamped to the original
        ((1000, 700, 5000, 9000), "pixels", WHOLE, FREE, (1000, 700, 1024, 768)),
        ((-500, 500, 500, 1500), "local", CROP, FREE, (100, 100, 200, 150)),  # clamped to the crop it refers to
        ((-500, 500, 500, 1500), "normalised", CROP, FREE, (0, 384, 512, 768)),  # refers to the original
        ((0, 0, 1e308, 1e308), "normalised", CROP, FREE, (0, 0, 1024, 768)),
        # 27 * (448 / 48) is 252.00000000000003, 42 * (300 / 56) 224.99999999999997: whole but for rounding.
        ((18, 18, 27, 27), "shown", View((0.0, 0.0, 448.0, 448.0), (48, 48)), FREE, (168, 168, 252, 252)),
        ((42, 42, 56, 56), "shown", View((0.0, 0.0, 300.0, 300.0), (56, 56)), FREE, (225, 225, 300, 300)),
        ((100, 100, 300, 300), "normalised", View((0, 0, 1, 1), (1, 1)), FREE, (102, 76, 308, 231)),
        ((0.3 * 1000, 0, 0.7 * 1000, 1000), "local", View((0.0, 0.0, 10.0, 10.0), (1, 1)), FREE, (3, 0, 7, 10)),
        # Too small: grown about the middle, and moved inward at an edge.
        ((100, 100, 102, 102), "pixels", WHOLE, CropRules(28, 4), (87, 87, 115, 115)),
        ((0, 0, 2, 2), "pixels", WHOLE, CropRules(28, 4), (0, 0, 28, 28)),
        ((1022, 766, 1024, 768), "pixels", WHOLE, CropRules(28, 4), (996, 740, 1024, 768)),
        ((5, 5, 6, 6), "local", View((100.0, 50.0, 120.0, 80.0), (1, 1)), CropRules(28, 4), (100, 50, 120, 78)),
        # Too long: the short side grows.
        ((0, 100, 400, 110), "pixels", WHOLE, CropRules(1, 4), (0, 55, 400, 155)),
        ((500, 0, 510, 768), "pixels", WHOLE, CropRules(1, 4), (409, 0, 601, 768)),
        # 21 / 1.4 is 15.000000000000002, and 15 is all there is.
        ((0, 0, 21, 15), "shown", View((0.0, 0.0, 21.0, 15.0), (15, 21)), CropRules(1, 1.4), (0, 0, 21, 15)),
        ((100, 100, 102, 102), "pixels", WHOLE, CropRules(), (87, 87, 115, 115)),
        ((0, 100, 400, 110), "pixels", WHOLE, CropRules(), (0, 55, 400, 155)),
    ],
)
def test_what_is_cut(box: Any, frame: Any, view: View, rules: CropRules, expected: Any) -> None:
    assert rules.region(box, frame, view, SIZE) == expected


@pytest.mark.parametrize(
    ("box", "frame", "message"),
    [
        ((10, 20, 10, 40), "pixels", "left < right"),
        ((30, 20, 10, 40), "pixels", "left < right"),
        ((10, 40, 30, 20), "pixels", "top < bottom"),
        ((1024, 0, 2000, 100), "pixels", "outside"),
        ((-10, 0, 0, 100), "pixels", "outside"),
        ((0, 1000, 100, 2000), "local", "outside"),
        ((math.nan, 0, 1, 1), "pixels", "finite"),
        ((0, 0, math.inf, 1), "pixels", "finite"),
        ((0, 0, 10**400, 1), "pixels", "finite"),
        ((0, 0, 1), "pixels", "four"),
        ((0, 0, 1, 1), "metres", "no frame"),
    ],
)
def test_a_box_that_makes_no_sense_is_refused(box: Any, frame: Any, message: str) -> None:
    with pytest.raises(InvalidCall, match=message):
        CropRules(1, 4).region(box, frame, CROP, SIZE)


def test_a_strip_that_cannot_grow_is_refused() -> None:
    with pytest.raises(InvalidCall, match="at most 4 times the other"):
        CropRules(1, 4).region((0, 0, 1000, 1000), "normalised", WHOLE, (10, 1000))
    with pytest.raises(ValueError, match="at least 1"):
        CropRules(0, 4)
    with pytest.raises(ValueError, match="at least 1"):
        CropRules(28, 0.5)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(EDGES, EDGES, EDGES, EDGES),
    st.sampled_from(FRAMES),
    st.tuples(st.integers(1, 900), st.integers(1, 600), st.integers(1, 400), st.integers(1, 400)),
    st.integers(1, 60),
    st.floats(1, 8),
)
def test_whatever_is_cut_keeps_the_rules(box: Any, frame: Any, part: Any, side: int, aspect: float) -> None:
    left, top = min(part[0], 1023), min(part[1], 767)
    region = (float(left), float(top), float(min(left + part[2], 1024)), float(min(top + part[3], 768)))
    view, rules = View(region, (48, 64)), CropRules(side, aspect)
    bounds = region if frame in ("local", "shown") else (0.0, 0.0, 1024.0, 768.0)
    try:
        cut = rules.region(box, frame, view, SIZE)
    except InvalidCall:
        return
    assert bounds[0] <= cut[0] < cut[2] <= bounds[2] and bounds[1] <= cut[1] < cut[3] <= bounds[3]
    width, height = cut[2] - cut[0], cut[3] - cut[1]
    assert width >= min(side, bounds[2] - bounds[0]) and height >= min(side, bounds[3] - bounds[1])
    assert max(width, height) <= aspect * min(width, height) * (1 + 1e-6) + 1e-5
    # It shows all that was asked for and exists, to a rounding error.
    asked = to_original(box, frame, view, SIZE)
    for i in (0, 1):
        assert cut[i] <= max(asked[i], bounds[i]) + 1e-5 and cut[i + 2] >= min(asked[i + 2], bounds[i + 2]) - 1e-5


# --- the environment ---


def numbered() -> np.ndarray:
    """[768, 1024, 3]: red says the column, green the row, each over 256 times blue's."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.stack([x % 256, y % 256, x // 256 + 8 * (y // 256)], axis=2).astype(np.uint8)


def question(image: np.ndarray) -> Sample:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "colour?"}]
    messages = ({"role": "user", "content": parts}, {"role": "assistant", "content": "red"})
    return Sample(messages, "s", "t", {"kind": "exact", "value": "red"})


def call(**arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': 'crop', 'arguments': arguments})}</tool_call>"


def test_a_crop_of_a_crop_comes_from_the_original_pixels() -> None:
    image = numbered()
    # As the processor would show it: a tenth of the size. Cutting from that would show a tenth of the detail.
    env = CropEnv(lambda height, width: (height // 10, width // 10), CropRules(16, 4))
    assert len(env.reset(question(image))) == 1, "the reference reply is not shown"
    cases: list[tuple[dict[str, Any], tuple[int, int, int, int]]] = [
        ({"box": [100, 200, 600, 700], "frame": "pixels"}, (100, 200, 600, 700)),
        ({"box": [200, 400, 400, 600], "frame": "local", "source": 1}, (200, 400, 300, 500)),
        # Shown at 10 x 10 pixels.
        ({"box": [5, 5, 9, 9], "frame": "shown", "source": 2}, (250, 450, 290, 490)),
        ({"box": [500, 500, 1000, 1000], "frame": "local", "source": 3}, (270, 470, 290, 490)),
        ({"box": [0, 0, 500, 500], "frame": "normalised"}, (0, 0, 512, 384)),
    ]
    for arguments, region in cases:
        step = env.step(call(**arguments))
        assert step.flags == frozenset() and step.message is not None
        crop = step.message["content"][0]["image"]
        left, top, right, bottom = region
        np.testing.assert_array_equal(crop, image[top:bottom, left:right])
        assert str(list(region)) in step.message["content"][1]["text"]
    assert env.step("the answer is red").done


def test_the_pictures_of_a_conversation_are_counted_and_shown_on_both_axes() -> None:
    """At half of the width and a quarter of the height, so that no two axes can be confused."""
    env = CropEnv(lambda height, width: (height // 4, width // 2), CropRules(16, 4))
    cases: list[tuple[dict[str, Any], tuple[int, int, int, int]]] = [
        ({"box": [50, 50, 150, 150], "frame": "shown", "source": 0}, (100, 200, 300, 600)),
        ({"box": [10, 20, 50, 80], "frame": "shown", "source": 1}, (120, 280, 200, 520)),
        ({"box": [0, 250, 500, 500], "frame": "local", "source": 0}, (0, 192, 512, 384)),
    ]
    for _ in range(2):  # it begins anew
        env.reset(question(numbered()))
        for number, (arguments, region) in enumerate(cases):
            message = env.step(call(**arguments)).message
            assert message is not None
            text = f"Picture {number + 1}: pixels {list(region)} of picture 0."
            assert message["content"][1] == {"type": "text", "text": text}


def test_an_invalid_call_is_answered_and_flagged() -> None:
    env = CropEnv(lambda height, width: (height, width), CropRules(16, 4))
    env.reset(question(numbered()))
    for text, reason in [
        (call(box=[10, 10, 5, 20], frame="pixels"), "left < right"),
        (call(box=[10, 10, 50, 20]), "does not fit 'required'"),  # the frame is mandatory
        (call(box=[10, 10, 50, 20], frame="feet"), "does not fit 'enum'"),
        (call(box=[10, 10, 50], frame="pixels"), "does not fit 'minItems'"),
        (call(box=[10, 10, 50, 20], frame="local"), "give its number as source"),
        (call(box=[10, 10, 50, 20], frame="shown"), "give its number as source"),
        (call(box=[10, 10, 50, 20], frame="local", source=1), "no picture of that number; the last one is 0"),
        (call(box=[10, 10, 50, 20], frame="local", source=-1), "does not fit 'minimum'"),
        ("<tool_call>crop</tool_call>", "a call is JSON"),
        (call(box=[10, 10, 50, 20], frame="pixels").replace("crop", "zoom"), "there is no tool 'zoom'"),
    ]:
        step = env.step(text)
        assert step.flags == {"invalid"} and step.message is not None and reason in step.message["content"], step
    assert len(env.state["views"]) == 1
    assert not env.step(call(box=[10, 10, 50, 50], frame="local", source=0.0)).flags
    with pytest.raises(ValueError, match="no picture"):
        env.reset(Sample(({"role": "user", "content": "colour?"},), "s"))


def test_its_messages_fit_what_it_announces() -> None:
    """Crops of any shape, and refusals of anything, are within the bound that the shapes are chosen for."""
    base = shapes.model()
    base = replace(base, text=replace(base.text, vocab_size=320))
    _, processor = new_processor(base, tiny.samples(), max_pixels=32 * 32)
    environment = crop_environment(processor, CropRules(8, 4), max_turns=3)
    prompt = environment.prompt(0, question(numbered()), processor)
    assert '"name": "crop"' in processor.tokenizer.decode(prompt.rendered.tokens)
    ended = append_completion(prompt.rendered, [processor.im_end_token_id])
    texts = [
        call(box=[0, 0, x, y], frame="pixels")
        for x, y in [(8, 8), (1024, 768), (32, 8), (768, 192), (192, 768), (30, 33)]
    ]
    texts += [call(**{"b" * 500: "\u00e9" * 500}), "<tool_call>" + "x" * 9000 + "</tool_call>"]
    texts += ["<tool_call>" + json.dumps({"name": "\u4e2d" * 400, "arguments": {}}) + "</tool_call>"]
    env = environment.make(np.random.default_rng(0))
    env.reset(question(numbered()))
    for text in texts:
        message = env.step(text).message
        assert message is not None
        before, after = size_of(ended), size_of(append_message(ended, message, processor))
        environment.check(type(before)(after.tokens - before.tokens, after.frames[len(before.frames) :]))
