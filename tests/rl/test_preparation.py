"""Records before and after each preparation: every one accounted for, and what comes out is what a verifier expects."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindjax.data.samples import read_samples
from mindjax.data.tasks import NO_IMAGE, build
from mindjax.data.tasks.verify import is_right
from mindjax.rl import preparation as prep
from mindjax.rl.choices import named_option, split_options, typed_answer
from mindjax.rl.preparation import Judged, Prepared
from mindjax.types import Sample

IMAGE = {"type": "image", "image": "a.png"}


def sample(id: str, text: str = "What?", reply: str | None = None, image: bool = True, **fields: Any) -> Sample:
    user = {"role": "user", "content": [*([IMAGE] if image else []), {"type": "text", "text": text}]}
    return Sample((user, *([{"role": "assistant", "content": reply}] if reply is not None else [])), id, **fields)


def text_of(sample: Sample) -> str:
    return "".join(part.get("text", "") for part in sample.messages[0]["content"])


def reply_of(sample: Sample) -> str:
    assert sample.messages[-1]["role"] == "assistant"
    return sample.messages[-1]["content"]


def judged(*right: bool) -> list[Judged]:
    return [Judged(f"reply {i}", verdict) for i, verdict in enumerate(right)]


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("What is it?\nA. cat\nB. dog", "What is it?", ["cat", "dog"]),
        ("What is it?\n(A) cat\n(B) dog\n(C) cow", "What is it?", ["cat", "dog", "cow"]),
        ("What is it? A: cat B: dog C: cow", "What is it?", ["cat", "dog", "cow"]),
        ("What is it?\nOptions:\nA) a cat. Black.\nB) dog\n", "What is it?", ["a cat. Black.", "dog"]),
        ("What is it?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly.",
         "What is it?", ["cat", "dog"]),
        ("What is it? Answer with the letter only. A. cat B. dog", "What is it?", ["cat", "dog"]),
        ("What is it?\nA. cat\nB. dog\nIt may be night.", "What is it?\nIt may be night.", ["cat", "dog"]),
        ("Who wrote it, as A. Smith says?\nA. Poe\nB. Twain", "Who wrote it, as A. Smith says?", ["Poe", "Twain"]),
        ("这是什么？请选择正确的选项。\nA．猫\nB．狗", "这是什么？", ["猫", "狗"]),  # noqa: RUF001
        ("What is 3 + 4?\nA. 7\nB. 8", "What is 3 + 4?", ["7", "8"]),
        ("What is it?", "What is it?", []),
        ("As A. Smith asks: what?", "As A. Smith asks: what?", []),
        ("Plan B. Or C. Which?", "Plan B. Or C. Which?", []),
    ],
)  # fmt: skip
def test_options_are_told_from_the_question(text: str, question: str, options: list[str]) -> None:
    assert split_options(text) == (question, options)


@pytest.mark.parametrize(
    ("text", "kind", "right", "wrong"),
    [
        ("42", "int", "42", "43"),
        ("-7", "int", "-7", "7"),
        ("007", "string", "007", "7"),
        ("2.50", "float", "2.5", "2.6"),
        ("No", "yes_no", "no.", "yes"),
        ("\\frac{1}{2}", "maths", "\\frac{1}{2}", "2"),
        ("a black cat", "string", "A black cat.", "a cat"),
        ("3 apples", "string", "3 apples", "3"),
    ],
)
def test_an_answer_gets_the_type_it_reads_as(text: str, kind: str, right: str, wrong: str) -> None:
    answer = typed_answer(text)
    assert answer["kind"] == kind
    assert is_right(answer, right, lambda a, b: False) and not is_right(answer, wrong, lambda a, b: False)


def test_multiple_choice_becomes_an_open_question() -> None:
    record = sample("a", "How many?\nA. 3\nB. 4\nC. 12\nAnswer with the letter only.", "B",
                    answer={"kind": "choice", "value": "B"}, rejected="C", task="count")  # fmt: skip
    result = prep.to_cloze([record])
    (opened,) = result.samples
    assert opened == Sample(
        (
            {"role": "user", "content": [IMAGE, {"type": "text", "text": "How many?"}]},
            {"role": "assistant", "content": "4"},
        ),
        "a", "count", {"kind": "int", "value": 4, "wrong": ["3", "12"]}, "12",
    )  # fmt: skip
    assert result.kept == {"opened": 1} and not result.dropped
    assert text_of(record).startswith("How many?\nA. 3"), "records are left as they are"


@pytest.mark.parametrize(
    ("why", "text", "answer", "reply"),
    [
        ("no_options", "How many?", {"kind": "choice", "value": "B"}, None),
        ("no_such_option", "How many?\nA. 3\nB. 4", {"kind": "choice", "value": "C"}, None),
        ("no_such_option", "How many?\nA. 3\nB. 4", {"kind": "choice", "value": "4"}, None),
        ("needs_options", "Which of the following is red?\nA. 3\nB. 4", {"kind": "choice", "value": "A"}, None),
        ("needs_options", "Which option is red?\nA. 3\nB. 4", {"kind": "choice", "value": "A"}, None),
        ("needs_options", "How many?\nA. 3\nB. None of the above", {"kind": "choice", "value": "B"}, None),
        ("needs_options", "How many?\nA. 3\nB. 4\nC. Both A and B", {"kind": "choice", "value": "C"}, None),
        ("needs_options", "下列哪项是红的？\nA. 猫\nB. 狗", {"kind": "choice", "value": "A"}, None),  # noqa: RUF001
        ("ambiguous", "What?\nA. Cat\nB. cat", {"kind": "choice", "value": "A"}, None),
        ("no_question", "A. cat\nB. dog", {"kind": "choice", "value": "A"}, None),
        ("reply_is_not_a_letter", "What?\nA. cat\nB. dog", {"kind": "choice", "value": "A"}, "It purrs, so A."),
    ],
)
def test_what_cannot_be_opened_is_dropped_and_says_why(why: str, text: str, answer: Any, reply: str | None) -> None:
    result = prep.to_cloze([sample("a", text, reply, answer=answer)])
    assert result == Prepared((), {}, {why: 1})


def test_what_is_open_already_stays_as_it_is() -> None:
    records = [
        sample("a", "How many?", "3", answer={"kind": "int", "value": 3}),
        sample("b", "Which letter is it?", "B", answer={"kind": "exact", "value": "B"}),
        sample("c", "Say A. or B. A. yes", None),
        sample("d", "In the following image, what is it?\nA. cat\nB. dog", answer={"kind": "choice", "value": "A"}),
    ]
    result = prep.to_cloze(records)
    assert result.samples[:3] == tuple(records[:3]) and result.kept == {"already_open": 3, "opened": 1}


def test_a_choice_with_its_options_in_the_answer_alone_is_opened() -> None:
    answer = {"kind": "choice", "value": "A", "options": ["cat", "dog"], "boxed": True}
    (opened,) = prep.to_cloze([sample("a", "What is it?", "(A) cat", answer=answer)]).samples
    assert opened.answer == {"kind": "string", "value": "cat", "wrong": ["dog"], "boxed": True}
    assert reply_of(opened) == "\\boxed{cat}"


@pytest.mark.parametrize(
    ("reply", "named"),
    [("B", "dog"), ("(b)", "dog"), ("B.", "dog"), ("B. dog", "dog"), ("dog", "dog"), ("B. cat", None), ("D", None),
     ("a dog", None), ("", None), ("B or A", None)],
)  # fmt: skip
def test_which_option_a_reply_names(reply: str, named: str | None) -> None:
    assert named_option(reply, ["cat", "dog"]) == named


def test_the_drawn_multiple_choice_is_opened_into_what_the_family_asks() -> None:
    drawn = build("digit_read", "train", 5, seed=3, variant="choice")
    result = prep.to_cloze(drawn)
    assert result.kept == {"opened": 5}
    for before, after in zip(drawn, result.samples, strict=True):
        assert " A: " in text_of(before) and text_of(after) == text_of(before).split(" A: ")[0]
        assert after.answer is not None and is_right(after.answer, reply_of(after))
        assert not any(is_right(after.answer, wrong) for wrong in after.answer["wrong"])
        assert after.messages[0]["content"][0] is before.messages[0]["content"][0], "the picture itself"


def test_boxes_are_asked_for_and_counted_alone() -> None:
    records = [
        sample("a", "How many?", "3", answer={"kind": "int", "value": 3}, rejected="4"),
        sample("b", "How many?", answer={"kind": "int", "value": 3}),
        sample("c", "How many?", "So \\boxed{3}", answer={"kind": "int", "value": 3}),
        sample("d", "How many?", "\\boxed{3}", answer={"kind": "int", "value": 3, "boxed": True}),
        sample("e", "Tell me.", "Well."),
        sample("f", "How many?", "I see 3 of them", answer={"kind": "int", "value": 3}),
        sample("g", "Half of x?", "\\frac{x}{2}", answer={"kind": "maths", "value": "\\frac{x}{2}"}),
    ]
    result = prep.with_boxed_instruction(records)
    assert result.kept == {"boxed": 4, "already_boxed": 1}
    assert result.dropped == {"no_answer": 1, "reply_is_not_the_answer": 1}
    a, b, c, d, g = result.samples
    assert reply_of(a) == "\\boxed{3}" and a.rejected == "\\boxed{4}" and reply_of(c) == "So \\boxed{3}"
    assert text_of(a) == text_of(b) == "How many?\nPut the final answer in \\boxed{}." and text_of(d) == "How many?"
    assert b.messages[-1]["role"] == "user" and d == records[3] and reply_of(g) == "\\boxed{\\frac{x}{2}}"
    assert a.answer is not None and is_right(a.answer, "\\boxed{3}") and not is_right(a.answer, "3")


def test_a_question_keeps_the_place_of_its_pictures() -> None:
    content = [{"type": "text", "text": "Here:"}, IMAGE, {"type": "text", "text": "How many?"}, IMAGE]
    hello = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
    messages = (*hello, {"role": "user", "content": content})
    record = Sample(messages, "a", answer={"kind": "int", "value": 3})
    (boxed,) = prep.with_boxed_instruction([record]).samples
    asked = {"type": "text", "text": "Here:\nHow many?\nPut the final answer in \\boxed{}."}
    assert boxed.messages[:2] == messages[:2] and boxed.messages[2]["content"] == [asked, IMAGE, IMAGE]


@settings(max_examples=60, deadline=None)
@given(multimodal=st.integers(1, 40), text=st.integers(1, 40), percent=st.integers(0, 95), seed=st.integers(0, 5))
def test_a_mixture_has_its_share_everywhere(multimodal: int, text: int, percent: int, seed: int) -> None:
    records = [sample(f"m{i}") for i in range(multimodal)] + [sample(f"t{i}", image=False) for i in range(text)]
    share = percent / 100
    try:
        result = prep.mix_text_only(records, share, seed)
    except ValueError as error:
        assert "cannot be made" in str(error)
        return
    kinds = [not prep.has_image(one) for one in result.samples]
    for place in range(1, len(kinds) + 1):
        assert abs(sum(kinds[:place]) - share * place) <= 1.5
    assert sum(result.kept.values()) + sum(result.dropped.values()) == len(records)
    # Nothing is left over that could make it larger.
    leftovers = result.dropped.get("surplus_text_only", 0), result.dropped.get("surplus_multimodal", 0)
    assert min(leftovers) <= 1 or share == 0
    shuffled = [records[i] for i in np.random.default_rng(seed).permutation(len(records))]
    assert prep.mix_text_only(shuffled, share, seed) == result
    assert len({one.id for one in result.samples}) == len(result.samples)


def test_another_seed_mixes_others_and_a_share_needs_records() -> None:
    records = [sample(f"m{i}") for i in range(40)] + [sample(f"t{i}", image=False) for i in range(40)]
    kept = [{one.id for one in prep.mix_text_only(records, 0.1, seed).samples} for seed in (0, 1)]
    assert kept[0] != kept[1] and len(kept[0]) == 44
    for share, some in ((0.5, records[:40]), (0.1, records[40:]), (0.001, records)):
        with pytest.raises(ValueError, match="cannot be made"):
            prep.mix_text_only(some, share)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        prep.mix_text_only(records, 1.0)


def test_what_is_always_or_never_right_leaves() -> None:
    records = [sample(id) for id in "abcde"]
    replies = {"a": judged(True, True), "b": judged(False, False), "c": judged(False, True), "d": judged(True)}
    result = prep.drop_decided(records, replies)
    assert result.samples == (records[2],)
    assert result.dropped == {"all_right": 1, "all_wrong": 1, "too_few_replies": 2}


def test_leakage_is_found_without_the_images_and_leaves_the_pool() -> None:
    records = [
        *(sample(id, "What is it?", "a cat", answer={"kind": "exact", "value": "a cat"}) for id in "abc"),
        sample("t", "2 + 2?", "4", image=False, answer={"kind": "int", "value": 4}),
    ]
    blind = prep.blind_questions(records)
    assert blind.dropped == {"text_only": 1} and [one.id for one in blind.samples] == ["a", "b", "c"]
    assert not any(prep.has_image(one) for one in blind.samples) and blind.samples[0].answer == records[0].answer
    replies = {"a": judged(False, False, True, False), "b": judged(False, False)}
    pool = prep.without_leakage(records, replies)
    assert [one.id for one in pool.samples] == ["b", "t"]
    assert pool.kept == {"needs_image": 1, "text_only": 1} and pool.dropped == {"leaked": 1, "no_replies": 1}
    assert prep.without_leakage(records, replies, most=0.25).kept == {"needs_image": 2, "text_only": 1}
    twins = prep.ablated_twins(records, replies)
    assert twins.kept == {"twins": 1} and twins.dropped == {"leaked": 1, "no_replies": 1, "text_only": 1}
    (twin,) = twins.samples
    assert twin.id == "b/ablated" and not prep.has_image(twin) and text_of(twin) == "What is it?"
    assert reply_of(twin) == NO_IMAGE and twin.rejected == "a cat"
    assert twin.answer is not None and is_right(twin.answer, NO_IMAGE) and not is_right(twin.answer, "a cat")
    assert prep.ablated_twins(records).kept == {"twins": 3}


def test_twins_are_those_of_the_drawn_families() -> None:
    (cloze,), (ablated,) = (build("digit_read", "train", 1, 0, variant) for variant in ("cloze", "ablated"))
    (twin,) = prep.ablated_twins([cloze]).samples
    assert twin.answer == ablated.answer and twin.messages[-1] == ablated.messages[-1]
    assert [part["type"] for part in twin.messages[0]["content"]] == ["text"]


def test_videos_are_ablated_too_and_plain_text_is_left_alone() -> None:
    content = [{"type": "video", "video": ["0.png"], "fps": 2}, {"type": "text", "text": "What?"}]
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": content})
    (twin,) = prep.ablated_twins([Sample(messages, "a")]).samples
    assert twin.messages[:1] == messages[:1] and twin.messages[1]["content"] == content[1:]


def test_pairs_from_rollouts() -> None:
    records = [sample("a", reply="reference"), *(sample(id) for id in "bcd")]
    replies = {
        "a": [Judged("wrong 1", False), Judged("right", True), Judged("wrong 2", False)],
        "b": judged(True, True), "c": judged(False),
    }  # fmt: skip
    result = prep.pairs_from_rollouts(records, replies)
    (pair,) = result.samples
    assert pair.id == "a/rollouts" and reply_of(pair) == "right" and pair.rejected in ("wrong 1", "wrong 2")
    assert len(pair.messages) == 2, "the pair's reply takes the place of the reference"
    assert result.dropped == {"all_right": 1, "all_wrong": 1, "no_replies": 1}
    backwards = {id: list(reversed(judged)) for id, judged in replies.items()}
    assert prep.pairs_from_rollouts(records, backwards).samples == result.samples
    assert {prep.pairs_from_rollouts(records, replies, seed).samples[0].rejected for seed in range(20)} == {
        "wrong 1", "wrong 2"
    }  # fmt: skip


def test_pairs_from_known_wrong_answers() -> None:
    answer = {"kind": "int", "value": 3, "wrong": ["4", "03"]}
    records = [
        sample("a", reply="3", answer=answer),
        sample("b", reply="\\boxed{3}", answer={**answer, "boxed": True}),
        sample("c", answer=answer),
        sample("d", reply="3", answer={"kind": "int", "value": 3}),
        sample("e", reply="3", answer={"kind": "int", "value": 3, "wrong": ["003", "3"]}),
        sample("f", reply="Paris"),
    ]
    result = prep.pairs_from_known_wrong(records, {"f": ["Rome"]})
    assert [(one.id, reply_of(one), one.rejected) for one in result.samples] == [
        ("a/wrong", "3", "4"), ("b/wrong", "\\boxed{3}", "\\boxed{4}"), ("f/wrong", "Paris", "Rome"),
    ]  # fmt: skip
    assert result.dropped == {"no_reply": 1, "no_wrong_answer": 1, "wrong_is_right": 1}


def test_pairs_from_length_and_style_are_of_right_replies_alone() -> None:
    records = [sample(id) for id in "abcd"]
    replies = {
        "a": [Judged("3", True), Judged("It is 3", True), Judged("I would say that it is 3", True), Judged("", False)],
        "b": [Judged("\\boxed{3}", True), Judged("\\boxed{3}!", True)],
        "c": [Judged("3", True), Judged("3", True), Judged("four", False)],
    }
    by_length = prep.pairs_from_length(records, replies)
    assert [(one.id, reply_of(one), one.rejected) for one in by_length.samples] == [
        ("a/length", "3", "I would say that it is 3")
    ]
    assert by_length.dropped == {"no_contrast": 1, "too_few_right": 2}
    replies["a"].append(Judged("So \\boxed{3}", True))
    styled = prep.pairs_from_style(records, replies, prep.is_boxed)
    (pair,) = styled.samples
    assert pair.id == "a/style" and reply_of(pair) == "So \\boxed{3}" and "boxed" not in str(pair.rejected)
    assert styled.dropped == {"no_contrast": 1, "too_few_right": 2}
    assert not prep.pairs_from_style(records, replies, prep.is_boxed, margin=2.0).samples
    assert prep.pairs_from_length(records, {"a": [Judged("12", True), Judged("123", True)]}).kept == {"pairs": 1}
    with pytest.raises(ValueError, match="above 1"):
        prep.pairs_from_length(records, replies, ratio=1.0)


STEPS: dict[str, Callable[[list[Sample]], Prepared]] = {
    "cloze": prep.to_cloze,
    "boxed": prep.with_boxed_instruction,
    "mix": lambda samples: prep.mix_text_only(samples, 0.0),
    "decided": lambda samples: prep.drop_decided(samples, {"0": judged(True, False)}),
    "blind": prep.blind_questions,
    "leakage": lambda samples: prep.without_leakage(samples, {"0": judged(False)}),
    "twins": prep.ablated_twins,
    "rollouts": lambda samples: prep.pairs_from_rollouts(samples, {"0": judged(True, False)}),
    "wrong": lambda samples: prep.pairs_from_known_wrong(samples, {"0": ["none"]}),
    "length": lambda samples: prep.pairs_from_length(samples, {"0": [Judged("3", True), Judged("three", True)]}),
}


@pytest.mark.parametrize("name", STEPS)
def test_every_record_is_accounted_for_and_none_is_changed(name: str) -> None:
    variants = ("cloze", "choice", "boxed", "preference")
    drawn = [one for variant in variants for one in build("digit_read", "train", 2, 0, variant)]  # type: ignore[arg-type]
    records = [replace(one, id=str(i)) for i, one in enumerate([*drawn, *build("text_only", "train", 2, 0)])]
    before = [(one.id, json.dumps(one.answer), text_of(one), len(one.messages)) for one in records]
    result = STEPS[name](records)
    assert sum(result.kept.values()) == len(result.samples) and result.samples
    assert len(result.samples) + sum(result.dropped.values()) == len(records)
    assert before == [(one.id, json.dumps(one.answer), text_of(one), len(one.messages)) for one in records]
    assert all(number > 0 for number in (*result.kept.values(), *result.dropped.values()))
    with pytest.raises(ValueError, match=r"unique.*\['0'\]"):
        STEPS[name]([records[0], records[0]])
    assert not STEPS[name]([]).samples


def test_a_result_says_what_became_of_its_records() -> None:
    assert (
        str(Prepared((sample("a"),), {"opened": 1}, {"no_options": 2})) == "1 kept (1 opened), 2 dropped (2 no_options)"
    )
    assert str(Prepared((), {}, {})) == "0 kept, 0 dropped"


def test_records_of_a_file_go_all_the_way(tmp_path: Path) -> None:
    """JSONL multiple choice, opened, boxed, measured, screened, paired."""
    user = {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?\nA. cat\nB. dog"}]}
    line = {"messages": [user, {"role": "assistant", "content": "A"}], "answer": {"kind": "choice", "value": "A"}}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({**line, "id": id}) + "\n" for id in "abc"))
    records = prep.with_boxed_instruction(prep.to_cloze(read_samples(tmp_path / "data.jsonl")).samples).samples
    assert len(records) == 3

    def group(id: str, *texts: str) -> str:
        answer = records[0].answer
        assert answer is not None
        said = [{"text": text, "parts": {"correct": float(is_right(answer, text)), "length": -1.0}} for text in texts]
        return json.dumps({"step": 1, "sample_id": id, "samples": said}) + "\n"

    lines = group("a", "\\boxed{cat}", "\\boxed{cow}"), group("b", "cat", "dog"), group("c", "\\boxed{cat}", "cat")
    (tmp_path / "rollouts.jsonl").write_text("".join(lines) + "\n" + group("b", "\\boxed{cat}"))
    replies = prep.read_rollouts(tmp_path / "rollouts.jsonl")
    assert [reply.right for reply in replies["b"]] == [False, False, True]
    pool = prep.drop_decided(records, replies)
    assert [one.id for one in pool.samples] == ["a", "b", "c"]
    assert prep.without_leakage(pool.samples, {id: judged(id == "c") for id in "abc"}).dropped == {"leaked": 1}
    pairs = prep.pairs_from_rollouts(pool.samples, replies)
    assert (reply_of(pairs.samples[0]), pairs.samples[0].rejected) == ("\\boxed{cat}", "\\boxed{cow}")
    (tmp_path / "broken.jsonl").write_text(lines[0] + '{"sample_id": "a"}\n')
    with pytest.raises(ValueError, match=r"line 2: not .*KeyError: 'samples'"):
        prep.read_rollouts(tmp_path / "broken.jsonl")
