"""Multiple choice as text: where the options are, whether a question stands without them, what kind an answer is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# An option's letter: A. A) (A) A: and their full-width forms, at the start or after a space.
_MARKER = re.compile(r"(?:^|(?<=\s))[(（]?([A-Z])[.:)．：）、](?=\s|[^\x00-\x7f])[ \t]*")  # noqa: RUF001
# A sentence that only says how to answer a multiple choice, and a line that only announces the options.
_INSTRUCTION = re.compile(
    r"\b(answer|choose|select|pick|reply|respond)\b.*\b(letter|options?|choices?)\b|\b(letter|option)s?\b.*\bonly\b"
    r"|(选择|选出|回答).*(选项|字母)",
    re.IGNORECASE,
)
_SENTENCES = re.compile(r"(?<=[.?!])\s+|(?<=[。？！])\s*")  # noqa: RUF001
_LABEL = re.compile(r"\s*(options|choices|candidates|选项)\s*[:：]?\s*", re.IGNORECASE)  # noqa: RUF001
_SHOWN = r"(?! (?:image|picture|photo|figure|diagram|chart|graph|table|equation|expression|passage|text|code))"
# A question, and an option, that says nothing without the other options.
_ASKS_FOR_THEM = re.compile(
    rf"\b(?:the|these|those) following\b{_SHOWN}|\b(?:of|from|among) (?:the|these|those) (?:options|choices|below)\b"
    r"|\bwhich (?:one )?of (?:the|these|those)\b|\bwhich (?:option|choice|statement|answer)s?\b"
    r"|下列(?!图)|以下(?!图)|哪个选项|哪一项",
    re.IGNORECASE,
)
_NAMES_THEM = re.compile(
    r"\b(?:none|all|any|both|neither|either) of (?:the|these|those|them)\b|\b(?:none|all|both|neither)\b[^\n]* above\b"
    r"|\b(?:both|neither|either) \(?[A-Z]\)? (?:and|nor|or)\b|^\(?[A-Z]\)? (?:and|or|&) \(?[A-Z]\)?$"
    r"|以上|都不?是|都不?对",
    re.IGNORECASE,
)
_NAMED = re.compile(r"\(?([A-Za-z])\)?[.:)]?(?:\s+(.*))?", re.DOTALL)
_INTEGER = re.compile(r"[+-]?(?:0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"[+-]?[0-9]{1,15}\.[0-9]{1,15}")


def split_options(text: str) -> tuple[str, list[str]]:
    """(the question without its options and without how to choose, the options from A on); [] where it has none."""
    marks = list(_MARKER.finditer(text))
    best: list[re.Match[str]] = []
    for start in range(len(marks)):
        run: list[re.Match[str]] = []
        for mark in marks[start:]:
            if ord(mark[1]) == ord("A") + len(run):
                run.append(mark)
        # The last one of the longest: a question may name an A. before it lists its own.
        if len(run) >= max(2, len(best)) and run[0] is marks[start]:
            best = run
    if not best:
        return text, []
    ends = [mark.start() for mark in best[1:]]
    on_lines = all("\n" in text[mark.end() : end] for mark, end in zip(best, ends, strict=False))
    newline = text.find("\n", best[-1].end())
    last = newline if on_lines and newline >= 0 else len(text)
    options = [text[mark.end() : end].strip(" \t\n,;") for mark, end in zip(best, [*ends, last], strict=True)]
    stem = _without_instruction(text[: best[0].start()])
    if stem and _LABEL.fullmatch(stem[-1]):
        stem.pop()
    return "\n".join([*stem, *_without_instruction(text[last:])]).strip(), options


def _without_instruction(text: str) -> list[str]:
    """The lines of the text, less the sentences about how to choose, and less lines that held nothing else."""
    lines = []
    for line in text.strip().splitlines():
        sentences = [sentence for sentence in _SENTENCES.split(line) if sentence]
        stay = [sentence for sentence in sentences if not _INSTRUCTION.search(sentence)]
        if stay or not sentences:
            lines.append(line if len(stay) == len(sentences) else " ".join(stay))
    return lines


def stands_alone(question: str, answer: str) -> bool:
    """Whether question and answer make sense without the options."""
    return not (_ASKS_FOR_THEM.search(question) or _NAMES_THEM.search(answer))


def named_option(reply: str, options: Sequence[str]) -> str | None:
    """The option that a reply names, by its letter, its text or both; None where it says anything else."""
    reply = reply.strip()
    if reply in options:
        return reply
    named = _NAMED.fullmatch(reply)
    place = ord(named[1].upper()) - ord("A") if named else -1
    if named is None or not 0 <= place < len(options):
        return None
    return options[place] if (named[2] or options[place]).strip() == options[place] else None


def typed_answer(text: str) -> dict[str, Any]:
    """The answer that a verifier takes the text for: a number, yes or no, mathematics, else a string.

    Digits with leading zeros are a string: "007" is not 7.
    """
    text = text.strip()
    plain = text.rstrip(".")
    if _INTEGER.fullmatch(plain):
        return {"kind": "int", "value": int(plain)}
    if _DECIMAL.fullmatch(plain):
        return {"kind": "float", "value": float(plain)}
    if plain.casefold() in ("yes", "no", "是", "否"):
        return {"kind": "yes_no", "value": plain}
    if "\\" in text or (text.startswith("$") and text.endswith("$") and len(text) > 2):
        return {"kind": "maths", "value": text.strip("$")}
    return {"kind": "string", "value": text}
