"""The tokenizer trained on the spot: Qwen's shape, any text, and what our chat template prints."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindjax.data.processor import Processor
from mindjax.data.tokenizer import MARKUP_TOKENS, PRE_TOKENIZE, SPECIAL_TOKENS, train_tokenizer

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(processor: Processor) -> Any:
    return processor.tokenizer


def test_special_tokens_end_the_vocabulary(tokenizer: Any) -> None:
    assert len(tokenizer) == 450
    ids = tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *MARKUP_TOKENS])
    assert ids == list(range(450 - len(ids), 450))
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_vocabulary_size(corpus: list[str]) -> None:
    assert len(train_tokenizer(corpus, 400)) == 400
    assert len(train_tokenizer(["a"], 400)) == 256 + len(SPECIAL_TOKENS) + len(MARKUP_TOKENS)  # nothing to merge
    with pytest.raises(ValueError, match="256 bytes"):
        train_tokenizer(corpus, 256)


def test_training_is_deterministic(corpus: list[str], tokenizer: Any) -> None:
    again = train_tokenizer(corpus, 450)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(tokenizer: Any, text: str) -> None:
    import unicodedata

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert max(ids, default=0) < len(tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_text_is_cut_where_qwen_cuts_it(tokenizer: Any) -> None:
    reference = importlib.import_module("transformers.models.qwen2.tokenization_qwen2")
    assert PRE_TOKENIZE == reference.PRETOKENIZE_REGEX
    backend = tokenizer.backend_tokenizer
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("it's 12 words\n\n ok")]
    assert pieces == ["it", "'s", "Ġ", "1", "2", "Ġwords", "ĊĊ", "Ġok"]


def test_it_loads_from_its_folder(model_folder: Path, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(model_folder)
    text = "<|im_start|>user\nIt's 12 <tool_call> über\n\n<|im_end|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert "<|im_end|>" in loaded.all_special_tokens


def shown(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_template_turns_and_media(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What?\n"}, {"type": "video"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": ""},
    ]
    assert shown(tokenizer, messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|> What?\n"
        "<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("system", ["", "Be short."])
def test_template_tools(tokenizer: Any, system: str) -> None:
    calls = [
        {"type": "function", "function": {"name": "look", "arguments": {"at": "ü"}}},
        {"name": "look", "arguments": '{"at": 2}'},
    ]
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "Yes", "tool_calls": calls},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": [{"type": "image"}]},
        {"role": "assistant", "content": "", "tool_calls": calls[1:]},
    ]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    assert shown(tokenizer, messages, tools=[TOOL]) == (
        "<|im_start|>system\n" + (system + "\n\n" if system else "") + "# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nGo<|im_end|>\n"
        '<|im_start|>assistant\nYes\n<tool_call>\n{"name": "look", "arguments": {"at": "ü"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "look", "arguments": {"at": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\n"
        "<|vision_start|><|image_pad|><|vision_end|>\n</tool_response><|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"at": 2}}\n</tool_call><|im_end|>\n'
    )


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
        [{"role": "owner", "content": "a"}],
        [{"role": "system", "content": [{"type": "image"}]}],
        [{"role": "assistant", "content": [{"type": "image"}]}],
    ],
)
def test_template_refuses_what_it_could_not_show(tokenizer: Any, messages: list[dict[str, Any]]) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="cannot stand"):
        shown(tokenizer, messages)
