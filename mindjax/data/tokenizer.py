"""A byte-level BPE tokenizer trained on the spot, in Qwen's shape, with a chat template of our own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Control tokens of Qwen3-VL, in the order of its vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# One token each as well, but ordinary text: they survive `skip_special_tokens`.
MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
# Where Qwen2 cuts text before BPE: contractions, words, single digits, punctuation, line ends, spaces.
PRE_TOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Prints what the Qwen3-VL Instruct template prints, and refuses what that one silently drops: an unknown role, a
# system message that is not first, a picture where the model never saw one.
CHAT_TEMPLATE = r"""
{%- macro show(content, visual) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif visual and part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif visual and part.type == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- raise_exception('a part of type ' ~ part.type ~ ' cannot stand in this message') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set opens_with_system = messages and messages[0].role == 'system' -%}
{%- if tools or opens_with_system -%}
    {{- '<|im_start|>system\n' -}}
    {%- if opens_with_system -%}
        {{- show(messages[0].content, false) -}}
    {%- endif -%}
    {%- if tools -%}
        {{- '\n\n' if opens_with_system -}}
        {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
        {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
        {%- for tool in tools -%}
            {{- '\n' ~ (tool | tojson) -}}
        {%- endfor -%}
        {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' -}}
        {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' -}}
        {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' -}}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<|im_start|>user\n' ~ show(message.content, true) ~ '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' ~ show(message.content, false) -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {{- '\n' if message.content or not loop.first -}}
            {{- '<tool_call>\n{"name": "' ~ function.name ~ '", "arguments": ' -}}
            {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' -}}
        {{- '\n<tool_response>\n' ~ show(message.content, true) ~ '\n</tool_response>' -}}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' -}}
    {%- elif message.role != 'system' or not loop.first -%}
        {{- raise_exception('a message with role ' ~ message.role ~ ' cannot stand at place ' ~ loop.index0) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".strip()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer in Qwen2's shape, any text can be written in it.

    Args:
      texts: what to learn merges from.
      vocab_size: tokens in all: 256 bytes, the merges, and at the end the control and markup tokens. When `texts`
        hold too few pairs the vocabulary stays smaller; `len(tokenizer)` says how large it became.

    Returns:
      A transformers tokenizer with `CHAT_TEMPLATE`; `<|im_end|>` ends a turn, `<|endoftext|>` pads.

    Raises:
      ValueError: vocab_size leaves no room for the bytes and the control tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    extra = len(SPECIAL_TOKENS) + len(MARKUP_TOKENS)
    if vocab_size < 256 + extra:
        raise ValueError(f"vocab_size {vocab_size} is below {256 + extra}: 256 bytes and {extra} control tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - extra, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=262_144,
    )
