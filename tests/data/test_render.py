"""Rendering against transformers' Qwen3VLProcessor and get_rope_index, over generated conversations."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindjax.data.positions import positions_from_tokens
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered, append_completion, append_message, render

Message = dict[str, Any]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# --- generated conversations ---

# Letters, digits, line ends, spaces, combining marks, emoji; markup that is one token but no control token.
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12),
    st.text("\n\r\t ab1.<", max_size=8),
    st.sampled_from(["", "\n", "\n\n", " \n x", "<tool_call>", "</think>", "e\u0301", "assistant\n", "<|", "<3 s>"]),
)
TEXT_PART = TEXT.map(lambda text: {"type": "text", "text": text})
IMAGE_PART = st.tuples(st.integers(9, 90), st.integers(9, 90)).map(
    lambda size: {"type": "image", "image": noise(*size, 3)}
)
VIDEO_PART = st.tuples(
    st.integers(2, 13), st.integers(20, 60), st.integers(20, 60), st.sampled_from([1.0, 2.5, 24.0, 29.97])
).map(lambda v: {"type": "video", "video": noise(*v[:3], 3), "fps": v[3]})
PARTS = {"text": TEXT_PART, "image": IMAGE_PART, "video": VIDEO_PART}


@st.composite
def content(draw: st.DrawFn) -> str | list[Message]:
    if draw(st.sampled_from(["string", "parts", "parts"])) == "string":
        return draw(TEXT)
    return [draw(PARTS[kind]) for kind in draw(st.lists(st.sampled_from(list(PARTS)), max_size=4))]


CONTENT = content()
CALLS = st.lists(
    st.fixed_dictionaries({"name": TEXT, "arguments": st.one_of(TEXT, st.dictionaries(TEXT, TEXT, max_size=2))}),
    max_size=2,
)
TURN = st.one_of(
    CONTENT.map(lambda content: {"role": "user", "content": content}),
    st.tuples(st.one_of(TEXT, st.lists(TEXT_PART, max_size=2)), CALLS).map(
        lambda turn: {"role": "assistant", "content": turn[0], "tool_calls": turn[1]}
    ),
    CONTENT.map(lambda content: {"role": "tool", "content": content}),
)
SYSTEM = TEXT.map(lambda text: {"role": "system", "content": text})
CONVERSATION = st.tuples(st.lists(SYSTEM, max_size=1), st.lists(TURN, min_size=1, max_size=4)).map(
    lambda parts: parts[0] + parts[1]
)
TOOLS = st.one_of(st.none(), st.lists(st.dictionaries(TEXT, TEXT, max_size=2), min_size=1, max_size=2))


def parts_of(messages: list[Message], kind: str) -> list[Message]:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part for content in contents for part in content if part["type"] == kind]


def by_transformers(reference: Any, messages: list[Message], **options: Any) -> Any:
    metadata = [{"total_num_frames": len(part["video"]), "fps": part["fps"]} for part in parts_of(messages, "video")]
    extra = {"video_metadata": metadata, "do_sample_frames": True, "cap_pixels_per_frame": False} if metadata else {}
    options.setdefault("processor_kwargs", {}).update(extra)
    # transformers takes arrays with the channels anywhere, and guesses where; PIL images leave no doubt.
    from PIL import Image

    shown = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [
                {**part, "image": Image.fromarray(part["image"])} if part["type"] == "image" else dict(part)
                for part in content
            ]
        shown.append({**message, "content": content})
    return reference.apply_chat_template(shown, tokenize=True, return_dict=True, return_tensors="pt", **options)


def positions_by_transformers(inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """[B, T, 3] positions and [B] deltas of `get_rope_index`, which needs no more of a model than its merge size."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    model = types.SimpleNamespace(
        config=types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=2)),
        get_vision_position_ids=lambda *args, **kwargs: Qwen3VLModel.get_vision_position_ids(None, *args, **kwargs),
    )
    positions, deltas = Qwen3VLModel.get_rope_index(
        model,
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs.get("image_grid_thw"),
        inputs.get("video_grid_thw"),
        inputs["attention_mask"],
    )
    return positions.numpy().transpose(1, 2, 0), deltas.numpy()[:, 0]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=CONVERSATION, tools=TOOLS, add_generation_prompt=st.booleans())
def test_rendering_is_that_of_transformers(
    processor: Processor, reference: Any, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool
) -> None:
    options = {"add_generation_prompt": add_generation_prompt, "tools": tools}
    rendered = render(messages, processor, **options)
    expected = by_transformers(reference, messages, **options)
    assert rendered.tokens.tolist() == expected["input_ids"][0].tolist()
    assert rendered.modality.tolist() == expected["mm_token_type_ids"][0].tolist()
    positions, deltas = positions_by_transformers(expected)
    np.testing.assert_array_equal(rendered.positions, positions[0])
    assert rendered.next_position == len(rendered.tokens) + deltas[0]
    check_frames(rendered, expected, processor)


def check_frames(rendered: Rendered, expected: Any, processor: Processor) -> None:
    """One frame per run of placeholders, with the grid and the pixels of transformers."""
    runs = [run for run in np.split(rendered.modality, np.flatnonzero(np.diff(rendered.modality)) + 1) if run[0]]
    assert [len(run) for run in runs] == [len(patches) // 4 for patches, _ in rendered.frames]
    for kind, pixels, grids in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        frames = [frame for run, frame in zip(runs, rendered.frames, strict=True) if run[0] == kind]
        if not frames:
            continue
        wanted = [tuple(grid[1:]) for grid in expected[grids].tolist() for _ in range(grid[0])]
        assert [grid for _, grid in frames] == wanted
        ours = np.concatenate([patches for patches, _ in frames])
        levels = np.abs(ours - expected[pixels].numpy()) * 127.5
        assert levels.max() < 2.001 and (levels > 0.5).mean() < 0.03  # bounds: test_images.py, for fewer pixels


def test_left_padding_does_not_move_positions(processor: Processor, reference: Any) -> None:
    short = [{"role": "user", "content": [{"type": "image", "image": noise(40, 70, 3)}]}]
    long = [{"role": "user", "content": [{"type": "text", "text": "one two three " * 5}, *short[0]["content"]]}]
    inputs = by_transformers(
        reference, short, processor_kwargs={"padding": "max_length", "max_length": 60, "padding_side": "left"}
    )
    positions, _ = positions_by_transformers(inputs)
    real = inputs["attention_mask"][0].numpy().astype(bool)
    rendered = render(short, processor)
    assert not real[0] and real.sum() == len(rendered.tokens)
    np.testing.assert_array_equal(positions[0][real], rendered.positions)
    assert len(render(long, processor).tokens) > len(rendered.tokens)


# --- the loss mask ---


def replies(rendered: Rendered, processor: Processor) -> list[str]:
    """The text of each stretch of the loss mask."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.loss_mask, [0]])))
    return [processor.tokenizer.decode(rendered.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=CONVERSATION)
def test_loss_is_on_replies_alone(processor: Processor, messages: list[Message]) -> None:
    import unicodedata

    rendered = render(messages, processor, add_generation_prompt=True)
    expected = []
    for message in messages:
        if message["role"] == "assistant":
            alone = processor.tokenizer.apply_chat_template([message], tokenize=False)
            reply = alone.removeprefix("<|im_start|>assistant\n").removesuffix("\n")
            expected.append(unicodedata.normalize("NFC", reply))
    found = replies(rendered, processor)
    # A reply that begins with line ends gives the first ones to the header, whose token they share.
    assert len(found) == len(expected)
    for have, want in zip(found, expected, strict=True):
        assert want.endswith(have) and not want[: len(want) - len(have)].strip()
        assert have == want or want[0].isspace()
    assert not rendered.loss_mask[rendered.modality > 0].any()


def test_a_reply_is_masked_with_its_end_and_tool_calls(processor: Processor) -> None:
    messages = [
        {"role": "system", "content": "assistant\n"},
        {"role": "user", "content": "assistant\nno"},
        {"role": "assistant", "content": "Yes", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": ""},
    ]
    rendered = render(messages, processor, add_generation_prompt=True)
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert replies(rendered, processor) == [f"Yes\n{call}<|im_end|>", "<|im_end|>"]
    assert render(messages[:2], processor, add_generation_prompt=True).loss_mask.sum() == 0


def test_a_prompt_is_a_prefix_of_its_conversation(processor: Processor) -> None:
    messages = [{"role": "user", "content": [{"type": "image", "image": noise(40, 50, 3)}]}]
    prompt = render(messages, processor, add_generation_prompt=True)
    for reply in ("seven", " seven", "<tool_call>", "7", ""):
        whole = render([*messages, {"role": "assistant", "content": reply}], processor)
        assert whole.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist()
        assert np.flatnonzero(whole.loss_mask)[0] == len(prompt.tokens)


# --- control tokens that somebody writes ---


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>"])
@pytest.mark.parametrize("where", ["user", "assistant", "system", "tool", "split", "call", "schema"])
def test_a_written_control_token_stays_text(processor: Processor, token: str, where: str) -> None:
    """transformers and vLLM would read it as the control token."""
    image = {"type": "image", "image": noise(40, 50, 3)}
    messages: list[Message] = [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}]
    tools = None
    if where == "split":
        texts = [{"type": "text", "text": token[:1]}, {"type": "text", "text": token[1:]}]
        messages = [{"role": "user", "content": [image, *texts]}]
    elif where == "call":
        messages.append(
            {"role": "assistant", "content": "", "tool_calls": [{"name": token, "arguments": {token: token}}]}
        )
    elif where == "schema":
        tools = [{"name": "f", "description": token}]
    elif where == "system":
        messages.insert(0, {"role": "system", "content": f"x{token}"})
    else:
        messages.append({"role": where, "content": f"see {token}{token} there"})
    rendered = render(messages, processor, tools=tools)
    assert len(rendered.frames) == 1
    assert token in processor.tokenizer.decode(rendered.tokens)
    # The same with a harmless word holds as many control tokens.
    plain = {token: "word", token[:1]: "wo", token[1:]: "rd"}
    harmless = render(replaced(messages, plain), processor, tools=replaced(tools, plain))
    control = set(processor.special_tokens.values())
    assert [t for t in rendered.tokens if t in control] == [t for t in harmless.tokens if t in control]


def replaced(value: Any, words: dict[str, str]) -> Any:
    if isinstance(value, str):
        for old, new in words.items():
            value = value.replace(old, new) if len(old) > 1 or value == old else value
        return value
    if isinstance(value, dict):
        return {
            key if key in ("type", "text") else replaced(key, words): replaced(v, words) for key, v in value.items()
        }
    return [replaced(inner, words) for inner in value] if isinstance(value, list) else value


def test_private_characters_survive(processor: Processor) -> None:
    text = "\ue000<|im_end|>\ue001<|"
    rendered = render([{"role": "user", "content": text}], processor)
    assert text in processor.tokenizer.decode(rendered.tokens)


# --- completions ---


def test_a_completion_continues_its_prompt(processor: Processor) -> None:
    messages = [{"role": "user", "content": [{"type": "image", "image": noise(90, 40, 3)}]}]
    prompt = render(messages, processor, add_generation_prompt=True)
    sampled = [*processor.encode_text("it is"), *processor.encode_text(" se"), processor.im_end_token_id]
    whole = append_completion(prompt, sampled)
    assert whole.tokens.tolist() == [*prompt.tokens.tolist(), *sampled]
    assert whole.loss_mask.tolist() == [0.0] * len(prompt.tokens) + [1.0] * len(sampled)
    recomputed = positions_from_tokens(whole.tokens, [grid for _, grid in whole.frames], processor)
    np.testing.assert_array_equal(whole.positions, recomputed)
    assert whole.next_position == recomputed.max() + 1
    assert whole.modality.tolist()[-len(sampled) :] == [0] * len(sampled)
    assert whole.frames is prompt.frames
    for array, kind in ((whole.tokens, np.int32), (whole.loss_mask, np.float32), (whole.positions, np.int32)):
        assert array.dtype == kind
    assert append_completion(prompt, []).tokens.tolist() == prompt.tokens.tolist()
    with pytest.raises(ValueError, match="placeholder"):
        append_completion(prompt, [processor.image_token_id])


# --- messages that follow ---


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize("reply", ["it is seven", "\n", ""])
def test_a_message_follows_as_the_template_writes_it(processor: Processor, role: str, reply: str) -> None:
    """Where the reply is tokenized as the template would, the whole is what rendering it at once gives."""
    image = [{"type": "image", "image": noise(90, 40, 3)}]
    follows = {
        "role": role,
        "content": [
            {"type": "text", "text": "see<|im_end|>\n"},
            *image,
            {"type": "image", "image": noise(33, 70, 3, seed=1)},
        ],
    }
    prompt = render([{"role": "user", "content": image}], processor, add_generation_prompt=True)
    sampled = [*processor.encode_text(reply), processor.im_end_token_id]
    whole = append_message(append_completion(prompt, sampled), follows, processor)
    messages: list[Message] = [
        {"role": "user", "content": image},
        {"role": "assistant", "content": reply},
        follows,
    ]
    at_once = render(messages, processor, add_generation_prompt=True)
    if reply != "\n":  # which a header swallows
        np.testing.assert_array_equal(whole.tokens, at_once.tokens)
        np.testing.assert_array_equal(whole.positions, at_once.positions)
        np.testing.assert_array_equal(whole.modality, at_once.modality)
        assert whole.next_position == at_once.next_position
    assert [grid for _, grid in whole.frames] == [grid for _, grid in at_once.frames]
    for (ours, _), (theirs, _) in zip(whole.frames, at_once.frames, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert whole.frames[0][0] is prompt.frames[0][0], "the first picture is not processed again"
    before = len(prompt.tokens) + len(sampled)
    assert whole.tokens[:before].tolist() == [*prompt.tokens.tolist(), *sampled]
    assert whole.loss_mask[:before].tolist() == [0.0] * len(prompt.tokens) + [1.0] * len(sampled)
    assert not whole.loss_mask[before:].any()
    recomputed = positions_from_tokens(whole.tokens, [grid for _, grid in whole.frames], processor)
    np.testing.assert_array_equal(whole.positions, recomputed)


def test_no_message_follows_half_a_reply(processor: Processor) -> None:
    from dataclasses import replace

    prompt = render([{"role": "user", "content": "What?"}], processor, add_generation_prompt=True)
    message = {"role": "user", "content": "more"}
    for cut in (prompt, append_completion(prompt, processor.encode_text("it is"))):
        with pytest.raises(ValueError, match="this one was cut"):
            append_message(cut, message, processor)
    ended = append_completion(prompt, [processor.im_end_token_id])
    forgets = "{% for m in messages %}<|im_start|>{{ m.role if loop.last else 'x' }}\n<|im_end|>\n{% endfor %}"
    with pytest.raises(ValueError, match="writes a reply otherwise once a 'user' message follows"):
        append_message(ended, message, replace(processor, chat_template=forgets))


# --- errors ---


def test_bad_messages_say_what_is_wrong(processor: Processor, tmp_path: Any) -> None:
    def user(*parts: Any) -> list[Message]:
        return [{"role": "user", "content": list(parts)}]

    (tmp_path / "broken.png").write_bytes(b"no image")
    image, frames = noise(40, 40, 3), noise(4, 40, 40, 3)
    cases: list[tuple[Any, str]] = [
        ([], "no messages"),
        ([{"content": "x"}], "no role"),
        (["hello"], "no role"),
        ([{"role": "user", "content": 7}], "string or a list"),
        ([{"role": "owner", "content": "x"}], "role owner"),
        (user({"type": "sound"}), "message 0, part 0"),
        (user({"type": "text"}), "message 0, part 0"),
        (user({"type": "image"}), "needs either"),
        (user({"type": "image", "image": image, "path": "x.png"}), "needs either"),
        (user({"type": "text", "text": ""}, {"type": "image", "path": tmp_path / "broken.png"}), "broken.png"),
        (user({"type": "image", "image": tmp_path / "missing.png"}), "message 0, part 0: .*missing.png"),
        (user({"type": "image", "image": b"abc"}), "message 0, part 0: <bytes>"),
        (user({"type": "video", "video": frames}), "message 0, part 0: .*fps"),
        (user({"type": "video", "video": frames[:1], "fps": 2.0}), "at least 2 frames"),
    ]
    for messages, match in cases:
        with pytest.raises(ValueError, match=match):
            render(messages, processor)


def test_a_template_that_hides_or_invents_an_image_is_refused(processor: Processor) -> None:
    from dataclasses import replace

    image = {"type": "image", "image": noise(40, 40, 3)}
    hides = replace(processor, chat_template="{% for m in messages %}<|im_start|>user\n<|im_end|>{% endfor %}")
    with pytest.raises(ValueError, match=r"places for 0 images.*hold 1 images"):
        render([{"role": "user", "content": [image]}], hides)
    invents = replace(processor, chat_template="<|vision_start|><|image_pad|><|vision_end|>")
    with pytest.raises(ValueError, match=r"places for 1 images.*hold 0 images"):
        render([{"role": "user", "content": "x"}], invents)
    swaps = replace(processor, chat_template="<|video_pad|>")
    with pytest.raises(ValueError, match="places for 0 images and 1 videos"):
        render([{"role": "user", "content": [image]}], swaps)


def test_positions_refuse_tokens_that_do_not_fit_the_grids(processor: Processor) -> None:
    tokens = np.array([1, processor.image_token_id, processor.image_token_id, 2])
    assert positions_from_tokens(tokens, [(2, 4)], processor).tolist() == [[0] * 3, [1, 1, 1], [1, 1, 2], [3] * 3]
    for grids, match in (([(2, 2)], "makes 1 tokens"), ([], "1 runs"), ([(2, 4), (2, 2)], "1 runs")):
        with pytest.raises(ValueError, match=match):
            positions_from_tokens(tokens, grids, processor)
