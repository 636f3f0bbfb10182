"""Verifiable task families on real images: the answer is drawn first, then the picture that shows it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from mindjax.data.tasks import canvas, digits, letters, shapes, text
from mindjax.data.tasks.item import Item
from mindjax.data.tasks.sources import Split
from mindjax.types import Sample

Variant = Literal["cloze", "choice", "boxed", "ablated", "preference", "ablated_preference"]

FAMILIES: dict[str, Callable[[Split, np.random.Generator], Item]] = {
    "digit_read": digits.digit_read,
    "letters_read": letters.letters_read,
    "shape": shapes.shape,
    "quadrant": shapes.quadrant,
    "colour": shapes.colour,
    "digit_largest": digits.digit_largest,
    "digit_count": digits.digit_count,
    "digit_any": digits.digit_any,
    "digit_canvas": canvas.digit_canvas,
    "shape_any": shapes.shape_any,
    "locate": shapes.locate,
    "text_only": text.text_only,
}
NO_IMAGE = "There is no image."
_LETTERS = "ABC"
_TRIES = 1000  # repeated items in a row, before a family counts as exhausted


def build(family: str, split: Split, count: int, seed: int, variant: Variant = "cloze") -> list[Sample]:
    """Draws `count` different samples of a family; the same arguments give the same samples.

    Raises:
      ValueError: for an unknown family or variant, or where the family does not have so many different items.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no task family {family!r}; there are {', '.join(FAMILIES)}")
    if variant not in _VARIANTS:
        raise ValueError(f"there is no variant {variant!r}; there are {', '.join(_VARIANTS)}")
    samples: list[Sample] = []
    seen: set[bytes] = set()
    name = f"{family}/{variant}/{split}/{seed}"
    rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()[:16]))
    tries = 0
    while len(samples) < count:
        item = FAMILIES[family](split, rng)
        # What the picture shows decides, not who drew it: a repeated item is dropped.
        pixels = b"" if item.image is None else item.image.tobytes()
        key = hashlib.sha256(item.question.encode() + pixels).digest()
        if key in seen:
            tries += 1
            if tries == _TRIES:
                raise ValueError(f"{family} has only {len(samples)} different {split} items, {count} were asked for")
            continue
        seen.add(key)
        tries = 0
        sample = _VARIANTS[variant](item, f"{name}/{len(samples)}", family, rng)
        samples.append(replace(sample, difficulty=item.difficulty))
    return samples


def _user(item: Item, question: str, *, image: bool = True) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    if image and item.image is not None:
        content.append({"type": "image", "image": item.image})
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def _sample(user: dict[str, Any], reply: str, id: str, task: str, answer: Any, rejected: str | None = None) -> Sample:
    return Sample((user, {"role": "assistant", "content": reply}), id, task, answer, rejected)


def _cloze(item: Item, id: str, task: str, rng: np.random.Generator) -> Sample:
    return _sample(_user(item, item.question), item.reply, id, task, item.answer)


def _choice(item: Item, id: str, task: str, rng: np.random.Generator) -> Sample:
    """Three offered replies, one of them right, answered by its letter."""
    place = int(rng.integers(3))
    offered = [str(w) for w in rng.choice(item.wrong, 2, replace=False)]
    offered.insert(place, item.reply)
    question = item.question + "".join(f" {letter}: {text}" for letter, text in zip(_LETTERS, offered, strict=True))
    return _sample(_user(item, question), _LETTERS[place], id, task, {"kind": "exact", "value": _LETTERS[place]})


def boxed(reply: str) -> str:
    """The reply in the form that a question ending in "Box it." asks for."""
    return f"\\boxed{{{reply}}}"


def _boxed(item: Item, id: str, task: str, rng: np.random.Generator) -> Sample:
    answer = {**item.answer, "boxed": True}
    return _sample(_user(item, f"{item.question} Box it."), boxed(item.reply), id, task, answer)


def _ablated(item: Item, id: str, task: str, rng: np.random.Generator) -> Sample:
    """The question of a picture without the picture: the right reply says so."""
    answer = {"kind": "exact", "value": NO_IMAGE.rstrip(".")}
    return _sample(_user(item, item.question, image=False), NO_IMAGE, id, task, answer)


def _preference(item: Item, id: str, task: str, rng: np.random.Generator) -> Sample:
    """The right reply against a wrong one, plain or boxed, or the boxed one against the same without its box."""
    kind = rng.choice(("plain", "boxed", "form"), p=(0.5, 0.3, 0.2))
    wrong = str(rng.choice(item.wrong))
    if kind == "plain":
        return _sample(_user(item, item.question), item.reply, id, task, item.answer, wrong)
    rejected = boxed(wrong) if kind == "boxed" else item.reply
    answer = {**item.answer, "boxed": True}
    return _sample(_user(item, f"{item.question} Box it."), boxed(item.reply), id, task, answer, rejected)


def _ablated_preference(item: Item, id: str, task: str, rng: np.random.Generator) -> Sample:
    """Without a picture, saying so is preferred to any invented reply."""
    answer = {"kind": "exact", "value": NO_IMAGE.rstrip(".")}
    return _sample(_user(item, item.question, image=False), NO_IMAGE, id, task, answer, item.reply)


_VARIANTS: dict[str, Callable[[Item, str, str, np.random.Generator], Sample]] = {
    "cloze": _cloze,
    "choice": _choice,
    "boxed": _boxed,
    "ablated": _ablated,
    "preference": _preference,
    "ablated_preference": _ablated_preference,
}
