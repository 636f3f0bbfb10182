"""MGPO's environment: boxes of the shrunken picture, cut from the original; the arms to compare with; the recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindjax import mgpo
from mindjax.data.packing import SampleSize, size_of
from mindjax.data.processor import Processor
from mindjax.data.render import append_completion, append_message
from mindjax.data.samples import new_processor
from mindjax.experiment import load_experiment, to_dataclass
from mindjax.rl.crop_tool import CropRules
from mindjax.rl.mgpo import ASK_BOX, Arm, Looking, LookOnce, box_text, demonstration, parse_box
from mindjax.rl.tools import InvalidCall
from mindjax.types import Sample
from tests.train import tiny as shapes

LOOKING = Looking(9, 16, 16, 40, CropRules(28, 2.0), 10.0)
QUESTION = "Which digit?"


def sample(size: int = 320, box: tuple[int, int] = (200, 100)) -> Sample:
    """A picture whose pixels say where they are, with a card of 26 pixels at (left, top)."""
    y, x = np.mgrid[:size, :size]
    image = np.stack([x % 256, y % 256, x // 256 + 2 * (y // 256)], axis=2).astype(np.uint8)
    left, top = box
    answer = {"kind": "exact", "value": "7", "box": [left, top, left + 26, top + 26]}
    parts = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    return Sample(({"role": "user", "content": parts}, {"role": "assistant", "content": "7"}), "s", "t", answer)


def started(arm: Any, seed: int = 0, **options: Any) -> LookOnce:
    env = LookOnce(LOOKING, arm, np.random.default_rng(seed))
    env.reset(sample(**options))
    return env


def image_of(message: Any) -> np.ndarray:
    return message["content"][0]["image"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # 320 pixels shown as 48: one shown pixel is 20/3 of the original.
        ("06,09,12,15", (40, 60, 80, 100)),
        ("0,0,48,48", (0, 0, 320, 320)),
        ("30,15,36,18", (200, 96, 240, 124)),  # 20 high: grown to 28 about its middle
        (" 42,42,99,99 ", (280, 280, 320, 320)),
        ("7,7,10,10", (43, 43, 71, 71)),  # 46.67 to 66.67, outward 46 to 67, then grown
    ],
)
def test_boxes_of_the_shown_picture_are_cut_from_the_original(text: str, expected: Any) -> None:
    env = started("learned")
    assert env.state["views"][0].shown == (48, 48)
    crop = env.toolbox.call(env.state, "crop", env.call(text))
    assert crop.region == expected
    left, top, right, bottom = expected
    np.testing.assert_array_equal(crop.pixels, env.state["original"][top:bottom, left:right])
    step = env.step(text)
    assert step.flags == frozenset() and step.message is not None
    rows, columns = np.array(image_of(step.message).shape[:2]) // 16
    assert rows * columns <= 16 and max(image_of(step.message).shape[:2]) >= 64
    assert step.message["content"][1]["text"] == QUESTION
    assert env.step("7").done, "two turns, then it is over"


def test_no_box_gets_no_picture() -> None:
    for text in ("", "7", "1,2,3", "1,2,3,4,5", "a,b,c,d", "1,2,3,12345", "5,5,5,9", "60,60,70,70"):
        env = started("learned")
        step = env.step(text)
        assert step.flags == {"invalid"} and step.message is not None
        assert isinstance(step.message["content"], str) and step.message["content"].endswith(QUESTION)
        assert env.step("7").done
    with pytest.raises(InvalidCall):
        parse_box("1,2,3,4," + "9" * 100_000)


def test_the_other_arms_do_not_listen() -> None:
    """Oracle's crop shows the card, random's is anywhere and follows from its random numbers; both are 40 pixels."""
    oracle = started("oracle")
    for text in ("00,00,06,06", "nonsense"):
        box = oracle.call(text)["box"]
        assert np.isclose(box[2] - box[0], 40) and np.isclose(box[3] - box[1], 40)
        middle = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
        assert (np.abs(middle - [213, 113]) <= 10).all()
    boxes = [started("random", seed).call("00,00,06,06")["box"] for seed in range(200)]
    assert boxes[3] == started("random", 3).call("other")["box"]
    corners = np.array(boxes)[:, :2]
    assert (corners >= 0).all() and (corners <= 280).all() and (np.abs(corners.mean(0) - 140) < 20).all()
    assert started("oracle").step("nonsense").flags == frozenset()
    with pytest.raises(ValueError, match="needs an answer with a box"):
        LookOnce(LOOKING, "oracle", np.random.default_rng(0)).reset(replace(sample(), answer=None))


def test_the_arm_without_a_crop_has_the_tokens_of_both() -> None:
    env = LookOnce(LOOKING, "alone", np.random.default_rng(0))
    (message,) = env.reset(sample())
    assert image_of(message).shape == (80, 80, 3) and message["content"][1]["text"] == QUESTION
    assert env.step("7").done
    (two,) = LookOnce(LOOKING, "learned", np.random.default_rng(0)).reset(sample())
    assert image_of(two).shape == (48, 48, 3) and two["content"][1]["text"] == f"{QUESTION} {ASK_BOX}"


@pytest.mark.parametrize("size", [(40, 40), (40, 80), (28, 56), (10, 500), (500, 10), (64, 64), (28, 29)])
def test_a_view_takes_at_most_its_tokens(size: tuple[int, int]) -> None:
    shown = LOOKING.view(np.zeros((*size, 3), np.uint8), 16)
    rows, columns = shown.shape[0] // 16, shown.shape[1] // 16
    assert shown.shape[:2] == (rows * 16, columns * 16) and 12 <= rows * columns <= 16
    assert LOOKING.view(np.zeros((*size, 3), np.uint8), 2).shape[:2] in ((16, 32), (32, 16))


def test_a_demonstration_says_a_box_that_is_near() -> None:
    """Off by at most the spread, in the form that is parsed; the crop shows the card, whatever the box says."""
    rng, offsets = np.random.default_rng(0), []
    for _ in range(100):
        place = (int(rng.integers(8, 286)), int(rng.integers(8, 286)))
        shown = demonstration(sample(box=place), LOOKING, rng, 30.0)
        first, said, second, reply = shown.messages
        box = np.array(parse_box(said["content"]))
        assert len(said["content"]) == len("00,00,00,00") and (box >= 0).all() and (box <= 48).all()
        assert (box[2:] - box[:2] == 6).all()
        middle, wanted = (box[:2] + box[2:]) / 2 * 320 / 48, np.array(place) + 13
        inside = (wanted > 60) & (wanted < 260)
        offsets += (middle - wanted)[inside].tolist()
        assert reply["content"] == "7" and image_of(first).shape == (48, 48, 3)
        assert image_of(second).shape[0] >= 48
    assert max(map(abs, offsets)) <= 30 + 320 / 48 and 14 < np.std(offsets) < 21  # uniform: 30 / sqrt(3)
    assert box_text((-3.2, 44.0, 2.8, 50.0), (48, 48)) == "00,42,06,48"


def test_its_messages_fit_what_it_announces() -> None:
    base = shapes.model()
    base = replace(
        base, text=replace(base.text, vocab_size=320), vision=replace(base.vision, patch_size=8, temporal_patch_size=1)
    )
    _, processor = new_processor(base, [sample()], max_pixels=25 * 256)
    arms: tuple[Arm, ...] = ("learned", "random", "oracle", "alone")
    for arm in arms:
        environment = LOOKING.environment(arm, processor, QUESTION)
        assert environment.max_turns == (1 if arm == "alone" else 2)
        prompt = environment.prompt(0, sample(), processor)
        tokens = sum(len(patches) // 4 for patches, _ in prompt.rendered.frames)
        assert tokens == (25 if arm == "alone" else 9)
        for text in ("00,00,48,48", "0,0,4,8", "x"):
            fits(environment, prompt, text, processor)
    with pytest.raises(ValueError, match="must let 256 to 4096"):
        small = new_processor(base, [sample()], max_pixels=9 * 256)[1]
        LOOKING.environment("learned", small, QUESTION)


def fits(environment: Any, prompt: Any, text: str, processor: Processor) -> None:
    env = environment.make(np.random.default_rng(0))
    env.reset(sample())
    message = env.step(text).message
    if message is not None:
        ended = append_completion(prompt.rendered, [processor.im_end_token_id])
        before, after = size_of(ended), size_of(append_message(ended, message, processor))
        environment.check(SampleSize(after.tokens - before.tokens, after.frames[len(before.frames) :]))


def test_the_recipe_and_its_comparison(tmp_path: Path) -> None:
    for size in ("", ":debug"):
        config = load_experiment(f"experiments/mgpo.py{size}")
        settings = to_dataclass(mgpo.MGPOConfig, {key: value for key, value in config.items() if key != "kind"})
        looking = settings.looking
        assert settings.arms[0] == "learned" and looking.whole_tokens == looking.crop_tokens == 1
    arms = {"learned": [1.0, 1.0, 0.0, 1.0], "alone": [0.0, 0.0, 0.0, 1.0]}
    before = {arm: {"right": [0.0, 0.0, 0.0, 1.0], "on_card": 0.25} for arm in arms}
    del before["alone"]["on_card"]
    mgpo.write_json(tmp_path / "sft" / "result.json", {"arms": before})
    for arm, right in arms.items():
        for seed in (0, 1):
            found = {"right": right, "seconds": 3.0} | ({"on_card": 0.75} if arm == "learned" else {})
            mgpo.write_json(tmp_path / f"{arm}-{seed}" / "result.json", found)
    table = mgpo.compare(tmp_path, ("learned", "alone"), (0, 1))
    record = json.loads((tmp_path / "mgpo.json").read_text())
    assert record["learned"]["gain"]["mean"] == 0.5 and record["alone"]["gain"]["mean"] == 0.0
    assert record["learned - alone"]["mean"] == 0.5
    assert "75.0%" in table and "+50.0%" in table and "boxes on the card: 25.0% before" in table


@pytest.mark.prove
def test_the_job_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it at the debug size; started again it finds everything done."""
    config = load_experiment("experiments/mgpo.py:debug", ["arms=('learned','alone')"])
    mgpo.run(config, tmp_path)
    table = (tmp_path / "mgpo.txt").read_text()
    (tmp_path / "alone-0" / "result.json").unlink()
    mgpo.run(config, tmp_path)
    assert (tmp_path / "mgpo.txt").read_text().splitlines()[:4] == table.splitlines()[:4]
    assert "learned-0: finished before" in capsys.readouterr().err
