"""New weights in a running vLLM: the same answers as of an engine that starts on them, nothing left of the old."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mindjax.interop.random_checkpoint import TEXTS, random_checkpoint
from mindjax.models import catalog, hf_weights

PROGRAM = Path(__file__).with_name("vllm_update_program.py")
WITH_IMAGE, TEXT_ALONE = (0, 1), 2


@pytest.fixture(scope="module", params=["dense", "moe"])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program printed; the checkpoint "vision" is the old one with the new one's vision encoder."""
    folder = tmp_path_factory.mktemp(request.param)
    prepare(folder, moe=request.param == "moe")
    return run(folder)


def prepare(folder: Path, *, moe: bool) -> None:
    for seed, name in enumerate(("old", "new")):
        random_checkpoint(folder / f"{name}-hf", moe=moe, seed=seed)
        hf_weights.convert(folder / f"{name}-hf", folder / name)
    (config, old), (_, new) = (catalog.load(folder / name, dtype="float32") for name in ("old", "new"))
    hf_weights.convert(folder / "old-hf", folder / "vision")
    hf_weights.save(folder / "vision", config, {**old, "vision": new["vision"]})
    rng = np.random.default_rng(0)
    images = []
    for number, size in enumerate([(96, 64), (32, 80)]):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        images.append({"type": "image", "image": str(folder / f"{number}.png")})
    conversations = [
        [{"role": "user", "content": [images[0], {"type": "text", "text": TEXTS[0]}]}],
        [{"role": "user", "content": [{"type": "text", "text": TEXTS[1]}, *images]}],
        # Longer than one of vLLM's blocks of 128 tokens, or there were no prefix to read.
        [{"role": "user", "content": " ".join(TEXTS * 5)}],
    ]
    (folder / "conversations.json").write_text(json.dumps(conversations))


def run(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(PROGRAM), str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["token_ids"] for answer in answers]


def distance(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> list[float]:
    """The largest difference of log-probs of each conversation."""
    return [
        max(abs(a - b) for a, b in zip(x[key], y[key], strict=True) if a is not None)
        for x, y in zip(ours, theirs, strict=True)
    ]


@pytest.mark.parametrize("weights", ["new", "vision"])
def test_update_answers_as_an_engine_that_starts_on_the_weights(answers: dict[str, Any], weights: str) -> None:
    assert_same(answers[f"{weights} updated"], answers[f"{weights} started"])


def assert_same(updated: dict[str, Any], started: dict[str, Any]) -> None:
    """Tokens, and log-probs but for how requests were batched."""
    for request in ("cached", "scored"):
        assert tokens(updated[request]) == tokens(started[request])
        assert max(distance(updated[request], started[request], "logprobs")) < 1e-5
    assert max(distance(updated["scored"], started["scored"], "prompt_logprobs")) < 1e-5


def test_weights_changed_every_answer(answers: dict[str, Any]) -> None:
    old, new, vision = (answers[name]["scored"] for name in ("old", "new updated", "vision updated"))
    assert min(distance(old, new, "prompt_logprobs")) > 0.1
    changed = distance(old, vision, "prompt_logprobs")
    assert min(changed[row] for row in WITH_IMAGE) > 0.1
    assert changed[TEXT_ALONE] == 0


def test_update_back_gives_the_first_answers(answers: dict[str, Any]) -> None:
    assert answers["old again"] == answers["old"]


def test_without_the_resets_old_computations_are_served(answers: dict[str, Any]) -> None:
    """The defect that the resets are for is there: without them a new vision encoder changes nothing at all, and
    cached prefixes are answered by a mixture of both models."""
    assert answers["vision stale"]["scored"] == answers["old"]["scored"]
    assert answers["prefix stale"]["cached"] != answers["new started"]["cached"]


@pytest.mark.prove
def test_workers_in_other_processes_are_updated_too(tmp_path: Path) -> None:
    prepare(tmp_path, moe=True)
    answers = run(tmp_path, "--processes")
    for weights in ("new", "vision"):
        updated = answers[f"{weights} updated"]
        assert_same(updated, answers[f"{weights} started"])
        assert distance(updated["scored"], answers["old"]["scored"], "prompt_logprobs")[0] > 0.1


def test_wrong_parameters_are_refused_before_anything_changes(answers: dict[str, Any]) -> None:
    assert "missing text.embed" in answers["mistakes"]["missing"]
    assert "vision" in answers["mistakes"]["shape"]
    assert answers["after mistakes"] == answers["new started"]
