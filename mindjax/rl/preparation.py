"""Makes records fit for reinforcement learning and preference optimization: from records to records, with counts.

Every function takes samples with unique ids, leaves them as they are, and returns new ones, in the order of the old
but for `mix_text_only`, with counts of what became of them. Source: MindGPT-4ov, section 4.

    cloze = to_cloze(samples)               # multiple choice becomes an open question
    boxed = with_boxed_instruction(cloze.samples)
    print(cloze, boxed, sep="\\n")           # 90 kept (70 opened, 20 already_open), 10 dropped (10 needs_options)

What only a model can tell comes in as recorded replies, judged: `read_rollouts` takes them from a run's
`rollouts.jsonl`; ones made otherwise are a mapping from a sample's id to `Judged`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindjax.data.tasks import NO_IMAGE, boxed
from mindjax.data.tasks.verify import final, is_right
from mindjax.rl.choices import named_option, split_options, stands_alone, typed_answer
from mindjax.types import Sample

BOXED_INSTRUCTION = "Put the final answer in \\boxed{}."


@dataclass(frozen=True)
class Prepared:
    """What a step made of its records.

    Attributes:
      samples: the records that stay.
      kept: how they stay, name -> number; the numbers add up to `samples`.
      dropped: why the others do not, name -> number; with `kept` they add up to the records that came in.
    """

    samples: tuple[Sample, ...]
    kept: dict[str, int]
    dropped: dict[str, int]

    def __str__(self) -> str:
        def told(counts: dict[str, int]) -> str:
            inside = ", ".join(f"{number} {name}" for name, number in counts.items())
            return f" ({inside})" if counts else ""

        return f"{len(self.samples)} kept{told(self.kept)}, {sum(self.dropped.values())} dropped{told(self.dropped)}"


@dataclass(frozen=True)
class Judged:
    """A recorded reply to a sample.

    Attributes:
      text: what the policy said.
      right: the verdict.
    """

    text: str
    right: bool


Replies = Mapping[str, Sequence[Judged]]


def read_rollouts(path: str | Path) -> dict[str, list[Judged]]:
    """Judged replies by sample id, from the `rollouts.jsonl` of a run or of several, one after the other.

    Raises:
      ValueError: a line that is no group of rollouts; the message names it.
    """
    replies: dict[str, list[Judged]] = {}
    with Path(path).open() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                group = json.loads(line)
                judged = [Judged(str(one["text"]), float(one["parts"]["correct"]) >= 1.0) for one in group["samples"]]
                replies.setdefault(str(group["sample_id"]), []).extend(judged)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {number}: not {{"sample_id", "samples": [{{"text", "parts": {{"correct"}}}}]}} '
                    f"({type(error).__name__}: {error})"
                ) from None
    return replies


def to_cloze(samples: Sequence[Sample]) -> Prepared:
    """Turns multiple choice into open questions, so that a right guess is no longer one in four.

    A record is multiple choice where its answer is of kind "choice", or where it is one letter and the last question
    lists options under letters from A on. The options leave the question, with lines that say how to choose among
    them; the answer becomes the right option's text, typed as the number, yes or no, mathematics or words that it is,
    and keeps the other options as "wrong" (see `pairs_from_known_wrong`). A reply or rejected reply that is a letter
    becomes that option's text.

    Kept: `opened`, `already_open`. Dropped: `no_options` (multiple choice without its options), `no_such_option` (the
    letter has none), `needs_options` (question or answer refer to the options), `ambiguous` (two options are alike),
    `no_question` (nothing is left), `reply_is_not_a_letter` (it explains a choice that is no longer there).
    """
    return _each(samples, _opened)


def with_boxed_instruction(samples: Sequence[Sample], instruction: str = BOXED_INSTRUCTION) -> Prepared:
    """Asks for the answer in `\\boxed{}` and lets only the box count.

    A reply that the record has is boxed; so is a rejected one.

    Kept: `boxed`, `already_boxed` (its answer counts in a box alone). Dropped: `no_answer` (nothing is verified),
    `reply_is_not_the_answer` (a reply without a box that says more, or something else: where to put the box is not
    known).
    """

    def one(sample: Sample) -> tuple[str, Sample | None]:
        answer = sample.answer
        if answer is None:
            return "no_answer", None
        if answer.get("boxed", False):
            return "already_boxed", sample
        messages, reply = _parts(sample)
        if reply is not None and not final(reply)[1]:
            if not is_right(answer, reply, _not_mathematics):
                return "reply_is_not_the_answer", None
            reply = boxed(reply)
        rejected = sample.rejected
        if rejected is not None and not final(rejected)[1]:
            rejected = boxed(rejected)
        question = _question(sample)
        messages = _with_question(messages, f"{question}\n{instruction}" if question else instruction)
        return "boxed", replace(_joined(sample, messages, reply), answer={**answer, "boxed": True}, rejected=rejected)

    return _each(samples, one)


def mix_text_only(samples: Sequence[Sample], share: float, seed: int = 0) -> Prepared:
    """The largest mixture in which a share of the records is text alone, both kinds spread evenly.

    Ids and the seed decide which records stay and in what order, not the order they come in. Every beginning of the
    result has the share, to one record.

    Args:
      samples: of both kinds, told apart by whether their messages hold an image or a video.
      share: of text-only records, in [0, 1).
      seed: another one keeps others.

    Kept: `multimodal`, `text_only`. Dropped: `surplus_multimodal`, `surplus_text_only`.

    Raises:
      ValueError: a share outside of [0, 1), or one that the records cannot give.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share of text-only records must lie in [0, 1), not {share}")
    _unique(samples)
    order = sorted(samples, key=lambda sample: _chance(seed, sample.id))
    text = [sample for sample in order if not has_image(sample)]
    multimodal = [sample for sample in order if has_image(sample)]
    # As many of both as keep the share, bounded by whichever runs out.
    total = math.inf if share == 0 else len(text) / share
    total = math.floor(min(total, len(multimodal) / (1 - share)) + 1e-9)
    texts = min(round(total * share), len(text))
    others = min(total - texts, len(multimodal))
    if samples and (others == 0 or (share > 0 and texts == 0)):
        raise ValueError(
            f"a share of {share:g} text-only records cannot be made of {len(text)} of them and {len(multimodal)} "
            "others; add records, or set another share"
        )
    # The i-th record is text where the running count of text records passes a whole number.
    mixed, taken = [], 0
    for place in range(1, texts + others + 1):
        if taken < texts * place // (texts + others):
            mixed.append(text[taken])
            taken += 1
        else:
            mixed.append(multimodal[place - 1 - taken])
    dropped = {"surplus_multimodal": len(multimodal) - others, "surplus_text_only": len(text) - texts}
    return Prepared(tuple(mixed), _present({"multimodal": others, "text_only": texts}), _present(dropped))


def drop_decided(samples: Sequence[Sample], replies: Replies) -> Prepared:
    """Removes what the policy always or never gets right: groups of equal rewards have no advantage.

    Args:
      samples: records.
      replies: the policy's, judged; at least two to a record.

    Kept: `informative`. Dropped: `all_right`, `all_wrong`, `too_few_replies` (fewer than two: nothing is known).
    """

    def one(sample: Sample) -> tuple[str, Sample | None]:
        verdicts = {judged.right for judged in replies.get(sample.id, ())}
        if len(replies.get(sample.id, ())) < 2:
            return "too_few_replies", None
        if len(verdicts) == 1:
            return "all_right" if verdicts == {True} else "all_wrong", None
        return "informative", sample

    return _each(samples, one)


def blind_questions(samples: Sequence[Sample]) -> Prepared:
    """The same questions and answers without their pictures, under the same ids: roll these out to find leakage.

    Kept: `blind`. Dropped: `text_only`.
    """
    return _each(samples, lambda sample: ("blind", _blind(sample)) if has_image(sample) else ("text_only", None))


def without_leakage(samples: Sequence[Sample], blind: Replies, *, most: float = 0.0) -> Prepared:
    """Removes records that are answered right without their image: what they reward is not looking.

    Args:
      samples: records; those of text alone have nothing to leak.
      blind: judged replies to `blind_questions(samples)`.
      most: share of right blind replies that a record may have. 0 unless chance alone gives some, as for yes or no.

    Kept: `needs_image`, `text_only`. Dropped: `leaked`, `no_replies`.
    """

    def one(sample: Sample) -> tuple[str, Sample | None]:
        if not has_image(sample):
            return "text_only", sample
        found = _leak(sample, blind, most)
        return (found, None) if found else ("needs_image", sample)

    return _each(samples, one)


def ablated_twins(
    samples: Sequence[Sample], blind: Replies | None = None, *, most: float = 0.0, reply: str = NO_IMAGE
) -> Prepared:
    """Adversarial twins: the question without its image, where the right reply is to say so.

    A twin has "/ablated" after its id. The reply its original had becomes the rejected one, so that the twins are
    preference pairs as well.

    Args:
      samples: records.
      blind: judged replies to `blind_questions(samples)`. A question that is answered without its image needs none, so
        a leaked record has no twin. None screens nothing.
      most: as in `without_leakage`.
      reply: what says that there is no image.

    Kept: `twins`. Dropped: `text_only`, `leaked`, `no_replies`.
    """

    def one(sample: Sample) -> tuple[str, Sample | None]:
        if not has_image(sample):
            return "text_only", None
        if blind is not None and (found := _leak(sample, blind, most)):
            return found, None
        messages, original = _parts(_blind(sample))
        answer = {"kind": "exact", "value": reply.strip().rstrip(".")}
        twin = _joined(sample, messages, reply)
        return "twins", replace(twin, id=f"{sample.id}/ablated", answer=answer, rejected=original)

    return _each(samples, one)


def pairs_from_rollouts(samples: Sequence[Sample], replies: Replies, seed: int = 0) -> Prepared:
    """Preference pairs of a right and a wrong reply of the policy itself, one to a record, drawn by its id.

    Kept: `pairs`, with "/rollouts" after their ids. Dropped: `no_replies`, `all_right`, `all_wrong`.
    """

    def one(sample: Sample) -> tuple[str, Sample | None]:
        judged = _by_chance(replies.get(sample.id, ()), seed, sample.id)
        right = [reply.text for reply in judged if reply.right]
        wrong = [reply.text for reply in judged if not reply.right]
        if not judged:
            return "no_replies", None
        if not right or not wrong:
            return "all_wrong" if wrong else "all_right", None
        return "pairs", _pair(sample, "rollouts", right[0], wrong[0])

    return _each(samples, one)


def pairs_from_known_wrong(
    samples: Sequence[Sample], wrong: Mapping[str, Sequence[str]] | None = None, seed: int = 0
) -> Prepared:
    """Preference pairs of a record's own reply and an answer that is known to be wrong, drawn by its id.

    Args:
      samples: records that end with a reply.
      wrong: known-wrong answers by sample id; those under "wrong" in the answer (see `to_cloze`) count as well.
      seed: another one draws others.

    Kept: `pairs`, with "/wrong" after their ids. Dropped: `no_reply`, `no_wrong_answer`, `wrong_is_right` (the
    verifier takes each of them for right).
    """

    def one(sample: Sample) -> tuple[str, Sample | None]:
        _, reply = _parts(sample)
        answer = sample.answer or {}
        known = [*answer.get("wrong", ()), *(wrong or {}).get(sample.id, ())]
        if reply is None:
            return "no_reply", None
        if not known:
            return "no_wrong_answer", None
        # In the form of the reply: only what it says may tell the two apart.
        known = [boxed(text) if final(reply)[1] and not final(text)[1] else text for text in map(str, known)]
        known = [text for text in known if not (answer and is_right(answer, text, _not_mathematics)) and text != reply]
        if not known:
            return "wrong_is_right", None
        return "pairs", _pair(sample, "wrong", reply, _by_chance(known, seed, sample.id)[0])

    return _each(samples, one)


def pairs_from_style(
    samples: Sequence[Sample], replies: Replies, score: Callable[[str], float], *, margin: float = 0.0
) -> Prepared:
    """Preference pairs of two right replies that differ in style: the highest score against the lowest.

    Args:
      samples: records.
      replies: the policy's, judged; only right ones are paired, so that style is never bought with correctness.
      score: of a reply, higher is better, e.g. `is_boxed`.
      margin: by which the scores have to differ, more than 0 even so.

    Kept: `pairs`, with "/style" after their ids. Dropped: `too_few_right` (fewer than two), `no_contrast`.
    """
    return _each(samples, lambda sample: _contrast(sample, "style", replies, score, margin))


def pairs_from_length(samples: Sequence[Sample], replies: Replies, *, ratio: float = 1.5) -> Prepared:
    """Preference pairs of two right replies of which one is shorter, in characters.

    Args:
      samples, replies: as in `pairs_from_style`.
      ratio: how many times as long the longer one is at least; > 1.

    Kept: `pairs`, with "/length" after their ids. Dropped: `too_few_right`, `no_contrast`.

    Raises:
      ValueError: a ratio that is not above 1.
    """
    if not ratio > 1:
        raise ValueError(f"ratio is how many times as long the longer reply is, so above 1, not {ratio}")

    def shortness(text: str) -> float:
        return -math.log(max(len(text), 1))

    # A hair below, as the logarithm of a ratio is not always the difference of the logarithms.
    return _each(samples, lambda sample: _contrast(sample, "length", replies, shortness, math.log(ratio) * (1 - 1e-12)))


def is_boxed(reply: str) -> float:
    """A style for `pairs_from_style`: 1 where the reply has a closed `\\boxed{}`."""
    return float(final(reply)[1])


def has_image(sample: Sample) -> bool:
    """Whether any message holds an image or a video."""
    return any(part.get("type") in ("image", "video") for message in sample.messages for part in _content(message))


def _each(samples: Sequence[Sample], step: Callable[[Sample], tuple[str, Sample | None]]) -> Prepared:
    """Runs a step that names what it did: (name, the record that stays or None)."""
    _unique(samples)
    stay, kept, dropped = [], Counter[str](), Counter[str]()
    for sample in samples:
        name, result = step(sample)
        if result is None:
            dropped[name] += 1
        else:
            kept[name] += 1
            stay.append(result)
    return Prepared(tuple(stay), dict(kept), dict(dropped))


def _unique(samples: Sequence[Sample]) -> None:
    twice = [id for id, number in Counter(sample.id for sample in samples).items() if number > 1]
    if twice:
        raise ValueError(f"ids of samples must be unique, and these are not: {twice[:3]}; put the source into them")


def _present(counts: dict[str, int]) -> dict[str, int]:
    return {name: number for name, number in counts.items() if number}


def _chance(seed: int, id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{id}".encode()).digest()


def _by_chance(items: Iterable[Any], seed: int, id: str) -> list[Any]:
    """The items without repetition, in an order that the id and what they are decide."""
    return sorted(dict.fromkeys(items), key=lambda item: _chance(seed, f"{id}/{item}"))


def _content(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _parts(sample: Sample) -> tuple[tuple[dict[str, Any], ...], str | None]:
    """(messages up to the last reply, that reply or None)."""
    if sample.messages and sample.messages[-1]["role"] == "assistant":
        return sample.messages[:-1], "".join(part.get("text", "") for part in _content(sample.messages[-1]))
    return sample.messages, None


def _joined(sample: Sample, messages: tuple[dict[str, Any], ...], reply: str | None) -> Sample:
    ending = () if reply is None else ({"role": "assistant", "content": reply},)
    return replace(sample, messages=(*messages, *ending))


def _pair(sample: Sample, source: str, chosen: str, rejected: str) -> Sample:
    pair = _joined(sample, _parts(sample)[0], chosen)
    return replace(pair, id=f"{sample.id}/{source}", rejected=rejected)


def _question(sample: Sample) -> str:
    """The text of the last user message."""
    for message in reversed(sample.messages):
        if message["role"] == "user":
            return "\n".join(part["text"] for part in _content(message) if "text" in part)
    return ""


def _with_question(messages: tuple[dict[str, Any], ...], question: str) -> tuple[dict[str, Any], ...]:
    """The messages with another text in the last user message: where its first text stood, pictures in their places."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    parts: list[dict[str, Any]] = []
    for part in _content(messages[last]):
        if "text" not in part:
            parts.append(part)
        elif question:
            parts.append({"type": "text", "text": question})
            question = ""
    if question:
        parts.append({"type": "text", "text": question})
    return (*messages[:last], {**messages[last], "content": parts}, *messages[last + 1 :])


def _blind(sample: Sample) -> Sample:
    messages = tuple(
        {**message, "content": [part for part in _content(message) if part.get("type") not in ("image", "video")]}
        if isinstance(message.get("content"), list)
        else message
        for message in sample.messages
    )
    return replace(sample, messages=messages)


def _leak(sample: Sample, blind: Replies, most: float) -> str:
    """Why a record may not be trusted to need its image, or ""."""
    judged = blind.get(sample.id, ())
    if not judged:
        return "no_replies"
    return "leaked" if sum(reply.right for reply in judged) > most * len(judged) else ""


def _contrast(
    sample: Sample, source: str, replies: Replies, score: Callable[[str], float], margin: float
) -> tuple[str, Sample | None]:
    right = list(dict.fromkeys(reply.text for reply in replies.get(sample.id, ()) if reply.right))
    if len(right) < 2:
        return "too_few_right", None
    # By their text where scores are equal, so that the order of the rollouts does not matter.
    ranked = sorted(right, key=lambda text: (score(text), text))
    difference = score(ranked[-1]) - score(ranked[0])
    if not (difference > 0 and difference >= margin):
        return "no_contrast", None
    return "pairs", _pair(sample, source, ranked[-1], ranked[0])


def _not_mathematics(right: str, said: str) -> bool:
    """Judges mathematics by how it is written, which `is_right` has already done."""
    return False


def _opened(sample: Sample) -> tuple[str, Sample | None]:
    answer = sample.answer or {}
    letter = str(answer.get("value", "")).strip("(). ").upper()
    choice = answer.get("kind") == "choice"
    messages, reply = _parts(sample)
    question, options = split_options(_question(sample))
    if not (choice or (options and re.fullmatch("[A-Z]", letter))):
        return "already_open", sample
    options = options or [str(option) for option in answer.get("options", ())]
    if not options:
        return "no_options", None
    place = ord(letter) - ord("A") if re.fullmatch("[A-Z]", letter) else -1
    if not 0 <= place < len(options) or not options[place]:
        return "no_such_option", None
    right, wrong = options[place], options[:place] + options[place + 1 :]
    if not stands_alone(question, right):
        return "needs_options", None
    if right.casefold() in (text.casefold() for text in wrong):
        return "ambiguous", None
    if not question.strip():
        return "no_question", None

    if reply is not None and (reply := named_option(reply, options)) is None:
        return "reply_is_not_a_letter", None
    opened = {**typed_answer(right), "wrong": wrong}
    if answer.get("boxed", False):
        opened["boxed"] = True
        reply = None if reply is None else boxed(reply)
    rejected = None if sample.rejected is None else named_option(sample.rejected, options)
    sample = _joined(sample, _with_question(messages, question), reply)
    return "opened", replace(sample, answer=opened, rejected=rejected)
