"""Rollouts written out for people: `<workdir>/rollouts.jsonl` and the pictures beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mindjax.data.images import decode_image
from mindjax.rl.rollout import Group
from mindjax.types import Trajectory


def show(workdir: Path, step: int, groups: Sequence[Group], advantages: np.ndarray) -> None:
    """Appends a line for every group.

    Args:
      workdir: of the run.
      step: finished steps, from 1.
      groups: that were trained.
      advantages: [G, N] of their trajectories.
    """
    with (workdir / "rollouts.jsonl").open("a") as file:
        for group, row in zip(groups, advantages, strict=True):
            sample = group.prompt.sample
            record = {
                "step": step,
                "prompt": _text(sample.messages),
                "sample_id": sample.id,
                "task": sample.task,
                "images": [_picture(workdir, image) for image in group.prompt.images],
                "answer": sample.answer,
                "samples": [
                    {
                        "text": _said(trajectory),
                        "parts": parts,
                        "total": score.total,
                        "advantage": float(advantage),
                        "flags": sorted(trajectory.flags),
                        "tokens": trajectory.policy_tokens,
                    }
                    for trajectory, parts, score, advantage in zip(
                        group.trajectories, group.parts, group.scores, row, strict=True
                    )
                ],
            }
            file.write(json.dumps(record) + "\n")


def _said(trajectory: Trajectory) -> str:
    """All that was said after the prompt; the environment's words are set apart."""
    return "\n".join(
        segment.text if segment.author == "policy" else f"[{segment.text}]" for segment in trajectory.segments
    )


def _text(messages: Sequence[dict[str, Any]]) -> str:
    """What the last user message asks, without its pictures."""
    content = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def _picture(workdir: Path, source: Any) -> str:
    """Saves the picture once, named for its content; its path within `workdir`."""
    pixels = decode_image(source)
    name = f"rollouts/{hashlib.sha256(pixels.tobytes() + str(pixels.shape).encode()).hexdigest()[:16]}.png"
    path = workdir / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.asarray(pixels)).save(path)
    return name
