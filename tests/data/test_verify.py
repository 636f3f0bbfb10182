"""What counts as a right reply, for every kind of answer."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindjax.data.tasks import verify
from mindjax.data.tasks.verify import extract, iou, is_right, overlap


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        ({"kind": "exact", "value": "red"}, " Red. ", True),
        ({"kind": "exact", "value": "red"}, "dark red", False),
        ({"kind": "exact", "value": "007"}, "007", True),
        ({"kind": "exact", "value": "007"}, "7", False),
        ({"kind": "exact", "value": "3", "boxed": True}, "3", False),
        ({"kind": "exact", "value": "3", "boxed": True}, "it is \\boxed{3}", True),
        ({"kind": "exact", "value": "3"}, "\\boxed{4} or \\boxed{3}", True),
        ({"kind": "exact", "value": "3"}, "\\boxed{3} or \\boxed{4}", False),
        ({"kind": "one_of", "value": ["12", "34"]}, "34", True),
        ({"kind": "one_of", "value": ["12", "34"]}, "14", False),
        ({"kind": "within", "value": 40, "tolerance": 5}, "45", True),
        ({"kind": "within", "value": 40, "tolerance": 5}, "46", False),
        ({"kind": "within", "value": 40, "tolerance": 5}, "about 40", False),
        ({"kind": "within", "value": 40, "tolerance": 5}, "٤٠", False),
        ({"kind": "within", "value": 40, "tolerance": 5}, "", False),
    ],
)
def test_verdicts(answer, reply, right):
    assert is_right(answer, reply) is right


# (answer, right replies, wrong ones, some of them malformed); "|" parts the replies
TYPED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"kind": "string", "value": "Top Left"},
        'top left| TOP  left. |"top left"|\uff34op\u3000left\u3002|\\boxed{\\text{top left}}|$\\text{Top Left}$',
        "left top|topleft|top left corner|top left, top right||\\boxed{top left|\\boxed{}",
    ),
    ({"kind": "string", "value": "007"}, "007|\uff10\uff10\uff17|007\u3002", "7|07|0007|-007|7.0"),
    ({"kind": "string", "value": 7}, "7", "07|7.0"),
    ({"kind": "string", "value": "东京"}, "东京|东京\u3002|\uff02东京\uff02|\\boxed{东京}", "京东|东京塔"),
    ({"kind": "string", "value": "cafe\u0301"}, "caf\u00e9|CAF\u00c9", "cafe"),
    ({"kind": "string", "value": "?"}, "?|\uff1f", "!|"),
    (
        {"kind": "int", "value": 1234},
        "1234|1,234|+1234| 01234.|\uff11\uff12\uff13\uff14|$1234$|\\boxed{1,234}|1\uff0c234",
        "12,34|1234.0|1 234|-1234|1234 apples|1233 1234||\u0661\u0662\u0663\u0664|1e3|\\boxed{1234",
    ),
    ({"kind": "int", "value": 102}, "102", "10\u00b2|10^2|\u2491"),
    ({"kind": "int", "value": "-7"}, "-7|\u22127|-007", "7|--7|\u20137"),
    ({"kind": "int", "value": 0}, "0|-0|000", "|-|o"),
    ({"kind": "int", "value": 10**4000}, "1" + "0" * 4000, "1" + "0" * 3999),
    (
        {"kind": "float", "value": 3.14},
        "3.14|+3.140|3.14.|314e-2|\uff13\uff0e\uff11\uff14|$3.14$|3.140003",
        "3.15|3.1|pi|3.14 3.14|3.140004",
    ),
    ({"kind": "float", "value": 3.14, "tolerance": 0.01}, "3.15|3.13|3.1401", "3.1501|3.12"),
    ({"kind": "float", "value": 2000, "relative": 0.01}, "2,020|1980.0|2.01e3", "2021|1979|20,00"),
    ({"kind": "float", "value": -2000, "relative": 0.01}, "-2,020|-1980", "-2021|-1979|2000"),
    # The larger of the two bounds, not both.
    ({"kind": "float", "value": 100, "tolerance": 1, "relative": 0.005}, "101|99", "101.1|98.9"),
    ({"kind": "float", "value": 100, "tolerance": 0.5, "relative": 0.01}, "101|99", "101.1|98.9"),
    ({"kind": "float", "value": 0}, "0|-0.0|.0|0e9", "1e-9||.|e5|-|nan|inf|1e999|0x0"),
    (
        {"kind": "choice", "value": "B"},
        "B|b|(B)|B.|B)|\\boxed{B}|\uff22|\uff08\uff22\uff09|\\boxed{\\text{B}}",
        "A|A or B|AB|B C|B. C|B) red|banana||the answer is B|\u0412",
    ),
    (
        {"kind": "choice", "value": "B", "options": ["red", "Dark Blue", "red"]},
        "B|B. dark blue|(b) Dark  Blue.|B: dark blue|dark blue",
        "A|B. red|A. dark blue|red|blue|dark",
    ),
    ({"kind": "choice", "value": "A", "options": ["red", "blue", "red"]}, "A|A. red", "red"),
    ({"kind": "choice", "value": "A", "options": ["B", "A"]}, "A|A: B", "B|B: A"),
    (
        {"kind": "yes_no", "value": True},
        "yes|Yes.|YES, there is a dog.|true|是|是的\u3002|是的\uff0c有一只猫\u3002|对|\\boxed{yes}",
        "no|否|不是|yes, no|no. yes|yes and no|maybe||it is, yes|是不是|yesterday",
    ),
    ({"kind": "yes_no", "value": "no"}, "No!|否|不是\u3002|不|false|没有\uff0c没有狗", "yes|是|not|no, yes"),
    (
        {"kind": "set", "value": ["red", "dark blue"]},
        "red, dark blue|Dark Blue and red.|red\u3001dark blue|dark blue; red|{red, dark blue}|red\ndark blue",
        "red|red, blue|red, dark blue, green|red dark blue||,|red, dark, blue",
    ),
    ({"kind": "set", "value": ["红", "蓝"]}, "红、蓝|蓝和红|蓝与红|红\uff0c蓝\u3002", "红|红蓝"),
    ({"kind": "set", "value": ["salt and pepper", "oil"]}, "oil, salt and pepper", "oil and salt and pepper"),
    ({"kind": "set", "value": [1, 2], "of": "int"}, "2, 1|\\boxed{\\{1, 2\\}}|01 and 2", "1, 2.0|1, x|12|1"),
    (
        {"kind": "box", "value": [10, 10, 20, 20]},
        '[10, 10, 20, 20]|(10,10,20,20)|{"bbox_2d": [10, 10.5, 20, 20], "label": "cat"}|\\boxed{[12, 10, 20, 20]}|'
        "[10, 10, 20, 20] or [10.0, 10, 20, 20]",
        "10, 10, 20, 20|[10, 10, 14, 20]|[20, 20, 10, 10]|[10, 10, 20]|[10, 10, 20, 20, 30]|[a, b, c, d]||"
        "[10, 10, 20, 20] or [0, 0, 5, 5]|[1e9, 0, 1, 1]|[10, 10, 20, nan]",
    ),
    ({"kind": "box", "value": [0, 0, 10, 10], "threshold": 0.9}, "[0, 0, 10, 9]", "[0, 0, 10, 8.9]"),
    ({"kind": "box", "value": [0, 0, 10, 10], "threshold": 0}, "[9, 9, 99, 99]", "[10, 10, 20, 20]|no"),
]


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        (answer, reply, verdict)
        for answer, *replies in TYPED
        for verdict, some in zip((True, False), replies, strict=True)
        for reply in some.split("|")
    ],
)
def test_typed_verdicts(answer, reply, right):
    assert is_right(answer, reply) is right
    boxed = {**answer, "boxed": True}
    assert is_right(boxed, reply) == (right and "boxed{" in reply)
    if "boxed{" not in reply:
        assert is_right(boxed, f"\\boxed{{1}}, no, {{so}}: \\boxed{{{reply}}}") is right


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"kind": "int", "value": "seven"}, "'seven' is no value of an answer of kind 'int'"),
        ({"kind": "float", "value": "seven"}, "is no number"),
        ({"kind": "choice", "value": "AB"}, "no value of an answer of kind 'choice'"),
        ({"kind": "choice", "value": "C", "options": ["x", "y"]}, "no value of an answer of kind 'choice'"),
        ({"kind": "yes_no", "value": "perhaps"}, "no value of an answer of kind 'yes_no'"),
        ({"kind": "set", "value": ["x"], "of": "int"}, "no value of an answer of kind 'set'"),
        ({"kind": "set", "value": ["x"], "of": "box"}, "not of 'box'"),
        ({"kind": "box", "value": [5, 5, 5, 9]}, "is no box"),
        ({"kind": "box", "value": [5, 5, 9]}, "is no box"),
        ({"kind": "maths", "value": "1"}, "pass mindjax.data.tasks.worker"),
    ],
)
def test_a_value_that_is_none_of_its_kind_is_an_error_and_not_a_wrong_reply(answer, message):
    with pytest.raises(ValueError, match=message):
        is_right(answer, "x")


@settings(deadline=None)
@given(value=st.integers(-(10**30), 10**30), zeros=st.integers(0, 5), other=st.integers(-(10**30), 10**30))
def test_whole_numbers_are_compared_by_value_and_strings_by_digits(value, zeros, other):
    sign, digits = ("-" if value < 0 else ""), f"{abs(value):,}"
    padded = f"{sign}{'0' * zeros}{abs(value)}"
    assert is_right({"kind": "int", "value": value}, f"{sign}{digits}") and is_right(
        {"kind": "int", "value": value}, padded
    )
    assert is_right({"kind": "int", "value": value}, str(other)) == (value == other)
    assert is_right({"kind": "string", "value": str(value)}, padded) == (zeros == 0)


@settings(deadline=None)
@given(value=st.floats(-1e12, 1e12), off=st.floats(-2, 2), tolerance=st.floats(0, 2))
def test_floats_are_right_within_their_tolerance(value, off, tolerance):
    answer = {"kind": "float", "value": value, "tolerance": tolerance, "relative": 0.0}
    # What is written counts, digit by digit: fractions, not the nearest floats.
    said = f"{value + off:.6f}"
    away = abs(Fraction(said) - Fraction(repr(value)))
    if min(away, abs(away - Fraction(repr(tolerance)))) > Fraction(1, 10**9):
        assert is_right(answer, said) == (away <= Fraction(repr(tolerance)))


@settings(deadline=None)
@given(reply=st.text(st.sampled_from("\\boxed{}$()[]0123456789.,-eE+ABab是否有和、\uff10\u3002 \n:;"), max_size=40))
def test_no_reply_is_an_error(reply):
    for answer, *_ in TYPED:
        assert is_right(answer, reply) in (True, False)


coordinates = st.floats(-1000, 1000, width=32).map(lambda x: round(x, 3))


@settings(deadline=None)
@given(a=st.tuples(*[coordinates] * 4), b=st.tuples(*[coordinates] * 4))
def test_iou_equals_torchvisions_in_float64(a, b):
    import torch
    from torchvision.ops import box_iou

    # Two different corners of each, in order; a box without area overlaps nothing.
    a, b = ((*map(min, box[:2], box[2:]), *map(max, box[:2], box[2:])) for box in (a, b))
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    expected = box_iou(*(torch.tensor([box], dtype=torch.float64) for box in (a, b))).item() if all(area) else 0.0
    assert iou(a, b) == pytest.approx(expected, abs=1e-12) == iou(b, a)
    if all(area):
        assert iou(a, a) == 1
        reply = f"[{', '.join(f'{x:.3f}' for x in b)}]"
        assert overlap({"kind": "box", "value": a}, reply) == pytest.approx(expected, abs=1e-12)


def test_only_boxes_overlap():
    with pytest.raises(ValueError, match="'int'"):
        overlap({"kind": "int", "value": 1}, "[0, 0, 1, 1]")
    assert overlap({"kind": "box", "value": [0, 0, 1, 1], "boxed": True}, "[0, 0, 1, 1]") == 0


def test_an_unknown_kind_of_answer_is_an_error_and_not_a_wrong_reply():
    with pytest.raises(ValueError, match="kind 'regex'"):
        is_right({"kind": "regex", "value": "x"}, "x")


def test_extract_tells_whether_there_was_a_box():
    assert extract("\\boxed{ Top Left }") == ("top left", True)
    assert extract("top left") == ("top left", False)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"so $x^{2}$ is \boxed{\text{top {left}}}, I think {", r"\text{top {left}}"),
        (r"\boxed{3} or \boxed{\frac{1}{2}", "3"),  # the second is never closed
        (r"\boxed{{3} or \boxed{4}", "4"),  # nor the first here
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{1 \boxed{2} {3}}", "2"),
        (r"} \boxed{\left\{ 3 \right.}", r"\left\{ 3 \right"),
        (r"\boxed{\{3\}}", r"\{3\}"),
        (r"\boxed{}", ""),
        (r"\boxed{3", None),
        (r"\boxed{3\}", None),
        (r"\boxed 3}", None),
    ],
)
def test_the_braces_of_a_box_pair_up(reply, said):
    assert extract(reply) == ((reply if said is None else said), said is not None)


def test_a_reply_of_nothing_but_boxes_is_read_in_one_pass(monkeypatch):
    """Every brace is looked at once, although no box is closed before the last character."""
    seen = []

    class Counting:
        def finditer(self, reply):
            for match in pattern.finditer(reply):
                seen.append(match.start())
                yield match

    pattern = verify._BRACE
    monkeypatch.setattr(verify, "_BRACE", Counting())
    reply = "\\boxed{" * 10_000 + "3" + "}" * 10_000
    assert extract(reply) == ("3", True)
    assert len(seen) == len(set(seen)) == 20_000
