"""Judges a reply against what an item knows about its right answers.

An answer is `{"kind": ..., "value": ...}`. What a reply says is what stands in its last closed `\\boxed{}`, else all of
it: a reply that hedges, or hides a value in a sentence, is wrong. With `"boxed": True` only the box counts, so that a
right value in the wrong form is wrong.

  exact   the reply is `value` (case and surrounding spaces aside)
  one_of  the reply is any of the list `value`
  within  the reply is a whole number of at most four digits, at most `tolerance` away from `value`
The others also read full-width characters and see through `$...$` and `\\text{...}`:
  string  the reply is `value`; case, spacing and punctuation at the ends aside, and "007" is not "7"
  int     a whole number, "1,234" and "007" too
  float   a number at most `tolerance` away from `value` (0 if left out), or `relative` of `value` (1e-6 if left out)
  choice  the letter `value`, bare, in brackets or with a full stop; with `options`, a list of texts, A first, the text
          may follow it or stand alone
  yes_no  `value` is True or False, or a word for it; English or Chinese, and a further clause may follow
  set     exactly the members of the list `value`, in any order, each read as `of`, "string" (the default) or "int"
  box     one box [x1, y1, x2, y2] whose intersection over union with `value` is at least `threshold` (0.5 if left out)
  maths   mathematics equal to `value`, which is LaTeX; judged by `math-verify`, see `mindjax.data.tasks.worker`
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

# (right answer, what a reply says) -> whether they are equal, as `Worker.maths` judges it
Maths = Callable[[str, str], bool]

_BRACE = re.compile(r"\\boxed\{|\\[{}]|[{}]")
# Full-width forms of ASCII, and the punctuation of Chinese text and of typesetters. Not NFKC, which makes 10² a 102.
_WIDTHS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict(
    zip(map(ord, "\u3000\u3002\u3001\u2212\u201c\u201d\u2018\u2019"), " .,-\"\"''", strict=True)
)
_WRAPPER = re.compile(r"\${1,2}([^$]*)\${1,2}|\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
_INTEGER = re.compile(r"([+-]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})?(?:\.[0-9]{0,40})?(?:e[+-]?[0-9]{1,3})?")
_CHOICE = re.compile(r"\(?([a-z])(?:[.:)\s]+(.*))?", re.DOTALL)
_COORDINATE = r"([+-]?[0-9]{1,7}(?:\.[0-9]{1,17})?)"
_BOX = re.compile(r"[\[(]\s*" + r"\s*,\s*".join([_COORDINATE] * 4) + r"\s*[\])]")
_YES = frozenset("yes true 是 是的 对 对的 正确 有".split())
_NO = frozenset("no false 否 不 不是 不对 错 错误 没有".split())
_ENDS = " .,;:!?\"'"


def final(reply: str) -> tuple[str, bool]:
    """What the reply says, as it stands there, and whether it said so in `\\boxed{}` (the last closed one counts)."""
    box = _last_box(reply)
    return (reply if box is None else reply[box]), box is not None


def extract(reply: str) -> tuple[str, bool]:
    """`final` without surrounding spaces, a full stop, and capitals."""
    text, boxed = final(reply)
    return text.strip().rstrip(".").strip().lower(), boxed


def _last_box(reply: str) -> slice | None:
    """Where the contents of the last closed `\\boxed{}` stand; braces inside it pair up, escaped ones are text.

    One pass, whatever the reply: a policy may well learn to write ten thousand boxes.
    """
    last, opened = None, []
    for brace in _BRACE.finditer(reply):
        if brace[0] in ("{", "\\boxed{"):
            opened.append(brace)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{" and (last is None or start.end() > last.start):
                last = slice(start.end(), brace.start())
    return last


def plain(text: str) -> str:
    """The text with ASCII for full-width characters, composed, without `$...$` or `\\text{...}` around all of it."""
    text = unicodedata.normalize("NFC", text.translate(_WIDTHS)).strip()
    while wrapped := _WRAPPER.fullmatch(text):
        text = (wrapped[1] if wrapped[1] is not None else wrapped[2]).strip()
    return text


def is_right(answer: dict[str, Any], reply: str, maths: Maths | None = None) -> bool:
    """Whether `reply` is right.

    Args:
      answer: see above.
      reply: of any length and content; all but `maths` takes time proportional to its length.
      maths: judges mathematics, `Worker().maths`; no other kind needs it.

    Raises:
      ValueError: for an unknown kind of answer, a value that is none of its kind, or mathematics without a judge.
    """
    kind, value = answer["kind"], answer["value"]
    text, boxed = final(reply)
    if kind not in KINDS:
        raise ValueError(f"answer kind {kind!r} is not known; known are {', '.join(KINDS)}")
    if answer.get("boxed", False) and not boxed:
        return False
    said = extract(reply)[0]
    if kind == "exact":
        return said == str(value).lower()
    if kind == "one_of":
        return said in {str(v).lower() for v in value}
    if kind == "within":
        return re.fullmatch(r"[0-9]{1,4}", said) is not None and abs(int(said) - value) <= answer["tolerance"]
    said = plain(text)
    if kind == "maths":
        if maths is None:
            raise ValueError(
                "mathematics is judged in a process of its own: pass mindjax.data.tasks.worker.Worker().maths"
            )
        said = said.rstrip(". ")
        # What is written alike is equal, whether or not it is mathematics: math-verify would not read a word.
        return plain(str(value)).split() == said.split() or maths(str(value), said)
    return _TYPED[kind](answer, said)


def right_reply(answer: dict[str, Any], reply: str, maths: Maths | None = None) -> str | None:
    """Which of the right replies this is, in one form for all ways to write it; None for a wrong one.

    For counting how many different right replies a policy gives. Where one reply alone is right, it is that one.
    """
    if not is_right(answer, reply, maths):
        return None
    if answer["kind"] == "one_of":
        return next(str(v) for v in answer["value"] if str(v).lower() == extract(reply)[0])
    return str(int(extract(reply)[0])) if answer["kind"] == "within" else str(answer["value"])


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2), 0 where one has no area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if not (_is_box(a) and _is_box(b)) or width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def overlap(answer: dict[str, Any], reply: str) -> float:
    """`iou` of the one box that a reply gives with that of an answer of kind "box"; 0 without one, or with several.

    Raises:
      ValueError: the answer is of another kind, or its value no box.
    """
    if answer["kind"] != "box":
        raise ValueError(f"only answers of kind 'box' overlap, this one is of kind {answer['kind']!r}")
    wanted = tuple(float(x) for x in answer["value"])
    if not _is_box(wanted):
        raise ValueError(f"{answer['value']!r} is no box; write [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    text, boxed = final(reply)
    if answer.get("boxed", False) and not boxed:
        return 0.0
    found = {tuple(map(float, numbers)) for numbers in _BOX.findall(plain(text))}
    return iou(found.pop(), wanted) if len(found) == 1 else 0.0


def _is_box(box: tuple[float, ...]) -> bool:
    return len(box) == 4 and box[0] < box[2] and box[1] < box[3]


def _string(text: str) -> str:
    """One form for all ways to write a string; punctuation stays where there is nothing else."""
    folded = " ".join(plain(text).casefold().split())
    return folded.strip(_ENDS) or folded


def _integer(text: str) -> str | None:
    """A whole number without sign +, commas and leading zeros; None for anything else. Digits, as they may be many."""
    found = _INTEGER.fullmatch(plain(text).rstrip("."))
    if found is None:
        return None
    digits = found[2].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if found[1] == "-" and digits != "0" else digits


def _judge_integer(answer: dict[str, Any], said: str) -> bool:
    return _integer(said) == _needed(_integer(str(answer["value"])), answer)


def _judge_float(answer: dict[str, Any], said: str) -> bool:
    """In decimal: 3.13 is 0.01 away from 3.14, which it is not in binary."""
    value = _decimal(answer["value"])
    text = said.casefold().rstrip(".")
    if not any(c.isdigit() for c in text.partition("e")[0]) or _NUMBER.fullmatch(text) is None:
        return False
    bound = max(_decimal(answer.get("tolerance", 0)), _decimal(answer.get("relative", 1e-6)) * abs(value))
    return abs(Decimal(text.replace(",", "")) - value) <= bound


def _decimal(value: Any) -> Decimal:
    try:
        return Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"{value!r} is no number") from None


def _judge_choice(answer: dict[str, Any], said: str) -> bool:
    letter, options = str(answer["value"]).casefold(), [_string(str(text)) for text in answer.get("options", ())]
    index = _needed(ord(letter) - ord("a") if re.fullmatch("[a-z]", letter) else None, answer)
    text = _needed(options[index] if index < len(options) else None, answer) if options else None
    found = _CHOICE.fullmatch(said.casefold())
    if found is not None and not found[2]:
        return found[1] == letter
    if found is not None and found[1] == letter and _string(found[2]) == text:
        return True
    return _string(said) == text and options.count(text) == 1


def _judge_yes_no(answer: dict[str, Any], said: str) -> bool:
    value = {True: "yes", False: "no"}.get(answer["value"], answer["value"])
    wanted = _needed(_yes_no(str(value)), answer)
    return _yes_no(said) == wanted


def _yes_no(text: str) -> bool | None:
    """What the first clause says, where no further one says the opposite."""
    clauses = [clause.strip() for clause in re.split(r"[.,;:!?\n]", plain(text).casefold())]
    verdicts = [clause in _YES for clause in clauses if clause in _YES | _NO]
    return verdicts[0] if clauses[0] in _YES | _NO and len(set(verdicts)) == 1 else None


def _judge_set(answer: dict[str, Any], said: str) -> bool:
    of = answer.get("of", "string")
    if of not in ("string", "int"):
        raise ValueError(f"a set can be of 'string' or 'int', not of {of!r}")
    form: Callable[[str], str | None] = _string if of == "string" else _integer
    wanted = {_needed(form(str(member)), answer) for member in answer["value"]}
    words = [word for word in (" and ", "和", "与") if not any(word in str(member) for member in answer["value"])]
    inside = re.fullmatch(r"\\?[{\[(](.*?)\\?[}\])]", said, re.DOTALL)
    members = re.split("|".join([r"[,;\n]", *words]), inside[1] if inside else said)
    return {form(member) for member in members if member.strip()} == wanted


def _judge_box(answer: dict[str, Any], said: str) -> bool:
    share = overlap({**answer, "boxed": False}, said)
    return share > 0 and share >= answer.get("threshold", 0.5)


def _needed(value: Any, answer: dict[str, Any]) -> Any:
    if value is None:
        raise ValueError(f"{answer['value']!r} is no value of an answer of kind {answer['kind']!r}")
    return value


_TYPED: dict[str, Callable[[dict[str, Any], str], bool]] = {
    "string": lambda answer, said: _string(said) == _string(str(answer["value"])),
    "int": _judge_integer,
    "float": _judge_float,
    "choice": _judge_choice,
    "yes_no": _judge_yes_no,
    "set": _judge_set,
    "box": _judge_box,
}
KINDS = ("exact", "one_of", "within", *_TYPED, "maths")
