"""Chat messages to tokens, loss mask, positions and patches: the one function that training, rollout, evaluation and
serving share.

The ids are those of transformers' `Qwen3VLProcessor.apply_chat_template(tokenize=True)`, with one difference made on
purpose: a control token that somebody *writes* (`<|image_pad|>` in a question, `<|im_end|>` in an answer) stays plain
text. transformers and vLLM read it as the control token, which lets a user end a turn or break the image count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindjax.data.images import image_name
from mindjax.data.positions import modality_from_tokens, positions_from_tokens
from mindjax.data.processor import Processor

_REPLY_HEADER = "assistant\n"
# Private use characters: a mark set inside every control token that a message spells out, gone before tokenizing.
_MARKS = [chr(code) for code in range(0xE000, 0xF900)]


@dataclass(frozen=True)
class Rendered:
    """One conversation as arrays.

    Attributes:
      tokens: [T] int32, placeholders expanded.
      loss_mask: [T] float32, 1 on what the assistant says, its <|im_end|> included.
      positions: [T, 3] int32, M-RoPE (time, height, width).
      modality: [T] int8, 0 text, 1 image, 2 video.
      frames: one (patches [n, P] float32, grid (rows, columns)) per image or temporal patch of a video, that is per
        vision attention segment, in token order.
      next_position: where a token after the last one stands.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    modality: np.ndarray
    frames: tuple[tuple[np.ndarray, tuple[int, int]], ...]
    next_position: int


def render(
    messages: Sequence[Mapping[str, Any]],
    processor: Processor,
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Rendered:
    """Renders one conversation.

    Args:
      messages: HF chat messages, `{"role": ..., "content": ...}`, optionally with "tool_calls". Content is a string or
        a list of parts: {"type": "text", "text": ...}, {"type": "image", "image": ...} with what `decode_image` takes,
        {"type": "video", "video": ..., "fps": ..., "frames_indices": ...} with what `VideoProcessor` takes. "path"
        may stand for "image" or "video".
      processor: tokenizer, template and pixel settings.
      add_generation_prompt: end with the header of an assistant reply.
      tools: JSON schemas of functions, as in HF.

    Raises:
      ValueError: a bad image or video (the message names it), an unknown part, a template that refuses the messages,
        a template that shows more or fewer pictures than the messages hold.
    """
    from jinja2 import TemplateError

    if not messages:
        raise ValueError("there are no messages to render")
    mark = _unused_mark((messages, tools))
    escape = _Escape(processor.special_tokens, mark)
    media: list[tuple[str, Mapping[str, Any], str]] = []
    shown = [_without_media(message, index, media) for index, message in enumerate(messages)]
    try:
        text = processor.tokenizer.apply_chat_template(
            escape(shown),
            tools=escape(list(tools)) if tools else None,
            chat_template=processor.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error

    writer = _Writer(processor, mark)
    waiting = iter(media)
    frames: list[tuple[np.ndarray, tuple[int, int]]] = []
    kinds = {"<|image_pad|>": "image", "<|video_pad|>": "video"}
    for piece in escape.split(text):
        if piece not in kinds:
            writer.add(piece)
            continue
        kind, part, name = next(waiting, (None, {}, ""))
        if kind != kinds[piece]:
            raise _count_error(text, media, kinds)
        frames += writer.add_image(part, name) if kind == "image" else writer.add_video(part, name)
    if next(waiting, None) is not None:
        raise _count_error(text, media, kinds)
    tokens, loss_mask = writer.finish()
    positions = positions_from_tokens(tokens, [grid for _, grid in frames], processor)
    return Rendered(
        tokens=tokens,
        loss_mask=loss_mask,
        positions=positions,
        modality=modality_from_tokens(tokens, processor),
        frames=tuple(frames),
        next_position=int(positions.max()) + 1,
    )


def append_completion(rendered: Rendered, token_ids: Sequence[int]) -> Rendered:
    """A prompt with sampled tokens after it, as they were sampled: nothing is tokenized again.

    The sampled tokens carry loss, the prompt no longer does; positions continue from `next_position`.

    Raises:
      ValueError: a sampled image or video placeholder, which no picture could fill.
    """
    sampled = np.asarray(token_ids, np.int32).reshape(-1)
    placeholders = np.unique(rendered.tokens[rendered.modality > 0])
    if np.isin(sampled, placeholders).any():
        raise ValueError("the sampled tokens hold an image or video placeholder; mask it in the sampler")
    count = len(sampled)
    positions = np.arange(rendered.next_position, rendered.next_position + count, dtype=np.int32)
    return Rendered(
        tokens=np.concatenate([rendered.tokens, sampled]),
        loss_mask=np.concatenate([np.zeros_like(rendered.loss_mask), np.ones(count, np.float32)]),
        positions=np.concatenate([rendered.positions, np.repeat(positions[:, None], 3, axis=1)]),
        modality=np.concatenate([rendered.modality, np.zeros(count, np.int8)]),
        frames=rendered.frames,
        next_position=rendered.next_position + count,
    )


def append_message(rendered: Rendered, message: Mapping[str, Any], processor: Processor) -> Rendered:
    """A conversation with somebody's answer to its last reply, and the header of a new reply.

    What stands there already stays as it is, token by token; only the message is tokenized, as the template would
    write it after a reply. Positions are computed anew over the whole sequence.

    Args:
      rendered: ends with the <|im_end|> of a reply, as sampled.
      message: what `render` takes, of a role that may follow a reply, e.g. "user" or "tool"; pictures may be in it.
      processor: that of `rendered`.

    Returns:
      The longer conversation. The loss mask of what was there is kept, the message has none.

    Raises:
      ValueError: the reply is not ended, the message is bad (see `render`), or the template writes a reply otherwise
        once something follows it.
    """
    if not len(rendered.tokens) or rendered.tokens[-1] != processor.im_end_token_id:
        raise ValueError("a message can only be appended after a reply that ends with <|im_end|>; this one was cut")
    # Control tokens cut text before it is tokenized, so what follows one is the same whatever came before it.
    before = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    context = render(before, processor)
    whole = render([*before, message], processor, add_generation_prompt=True)
    end = int(np.flatnonzero(context.tokens == processor.im_end_token_id)[-1]) + 1
    if not np.array_equal(whole.tokens[:end], context.tokens[:end]):
        raise ValueError(f"the chat template writes a reply otherwise once a {message['role']!r} message follows it")
    tokens = np.concatenate([rendered.tokens, whole.tokens[end:]])
    frames = (*rendered.frames, *whole.frames)
    positions = positions_from_tokens(tokens, [grid for _, grid in frames], processor)
    return Rendered(
        tokens=tokens,
        loss_mask=np.concatenate([rendered.loss_mask, np.zeros(len(whole.tokens) - end, np.float32)]),
        positions=positions,
        modality=modality_from_tokens(tokens, processor),
        frames=frames,
        next_position=int(positions.max()) + 1,
    )


def _without_media(message: Mapping[str, Any], index: int, media: list[tuple[str, Mapping[str, Any], str]]) -> Any:
    """The message as the template sees it; its images and videos go to `media`, in order."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"message {index} has no role: {message!r}")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"message {index}: content is a string or a list of parts, not {type(content).__name__}")
    parts: list[dict[str, Any]] = []
    for place, part in enumerate(content):
        where = f"message {index}, part {place}"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "video"):
            if sum(key in part for key in (kind, "path")) != 1:
                raise ValueError(f"{where}: a part of type {kind} needs either {kind!r} or 'path'")
            media.append((kind, part, where))
            parts.append({"type": kind})
        else:
            raise ValueError(f"{where}: a part is of type text (with a string), image or video, not {part!r:.100}")
    return {**message, "content": parts}


def _count_error(text: str, media: Sequence[tuple[str, Any, str]], kinds: Mapping[str, str]) -> ValueError:
    asked = {kind: text.count(token) for token, kind in kinds.items()}
    given = {kind: sum(1 for other, _, _ in media if other == kind) for kind in kinds.values()}
    return ValueError(
        f"the chat template has places for {asked['image']} images and {asked['video']} videos (in its order), the "
        f"messages hold {given['image']} images and {given['video']} videos; it may not show them in every role"
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _unused_mark(value: Any) -> str:
    used = set().union(*map(set, _strings(value)))
    return next(mark for mark in _MARKS if mark not in used)


class _Escape:
    """Breaks the control tokens in the strings of a message, so that the template's own can be told from them.

    The mark goes behind the first character of every pair that begins a control token, and behind a last character
    that could begin one together with the next string. Any control token that is left comes from the template.
    """

    def __init__(self, special_tokens: Mapping[str, int], mark: str) -> None:
        pairs = sorted({re.escape(token[:2]) for token in special_tokens})
        self._mark = mark
        self._risky = re.compile(f"(?={'|'.join(pairs)}).")
        self._firsts = tuple({token[0] for token in special_tokens})
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            broken = self._risky.sub(lambda match: match[0] + self._mark, value)
            return broken + self._mark if broken.endswith(self._firsts) else broken
        if isinstance(value, Mapping):
            return {self(key): self(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(inner) for inner in value]
        return value

    def split(self, text: str) -> list[str]:
        """Plain text and control tokens, in turn."""
        return [piece for piece in self._control.split(text) if piece]


class _Writer:
    """Collects tokens and their loss mask; neighbouring text is tokenized as one."""

    def __init__(self, processor: Processor, mark: str) -> None:
        self._processor = processor
        self._mark = mark
        self._header_length = len(processor.encode_text(_REPLY_HEADER))
        self._tokens: list[int] = []
        self._mask: list[float] = []
        self._text = ""
        self._after_start = False  # the next text begins with a role
        self._in_reply = False

    def add(self, piece: str) -> None:
        """Adds plain text or one control token."""
        token = self._processor.special_tokens.get(piece)
        if token is None:
            self._text += piece
        else:
            self._flush()
            self._control(token)

    def add_image(self, part: Mapping[str, Any], name: str) -> list[tuple[np.ndarray, tuple[int, int]]]:
        source = part["image"] if "image" in part else part["path"]
        frame = self._processor.image(source, _media_name(source, name))
        self._placeholders(self._processor.image_token_id, frame[1])
        return [frame]

    def add_video(self, part: Mapping[str, Any], name: str) -> list[tuple[np.ndarray, tuple[int, int]]]:
        source = part["video"] if "video" in part else part["path"]
        patches, grid, timestamps = self._processor.video(
            source, fps=part.get("fps"), frames_indices=part.get("frames_indices"), name=_media_name(source, name)
        )
        # transformers >= 5.10 keeps the template's own vision_start and vision_end around all frames; older ones
        # dropped that pair. vLLM follows whichever transformers is installed.
        for seconds in timestamps:
            self._text += f"<{seconds:.1f} seconds>"
            self._flush()
            self._control(self._processor.vision_start_token_id)
            self._placeholders(self._processor.video_token_id, grid)
            self._control(self._processor.vision_end_token_id)
        return [(frame, grid) for frame in patches]

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """tokens [T] int32 and loss_mask [T] float32."""
        self._flush()
        return np.asarray(self._tokens, np.int32), np.asarray(self._mask, np.float32)

    def _extend(self, tokens: Sequence[int], mask: Sequence[float]) -> None:
        self._tokens.extend(tokens)
        self._mask.extend(mask)

    def _placeholders(self, token: int, grid: tuple[int, int]) -> None:
        self._flush()
        count = grid[0] * grid[1] // self._processor.merge_size**2
        self._extend([token] * count, [0.0] * count)

    def _control(self, token: int) -> None:
        ends_turn = token == self._processor.im_end_token_id
        self._extend([token], [1.0 if ends_turn and self._in_reply else 0.0])
        if ends_turn:
            self._in_reply = False
        self._after_start = token == self._processor.im_start_token_id

    def _flush(self) -> None:
        if not self._text:
            return
        text, self._text = self._text.replace(self._mark, ""), ""
        tokens = self._processor.encode_text(text)
        mask = [1.0 if self._in_reply else 0.0] * len(tokens)
        if self._after_start and text.startswith(_REPLY_HEADER):
            self._in_reply = True
            # A reply that begins with a line end shares a token with the header ("\n\n"); after a generation prompt
            # no model could say that token, so it counts as header.
            mask = [0.0] * self._header_length + [1.0] * (len(tokens) - self._header_length)
        self._after_start = False
        self._extend(tokens, mask)


def _media_name(source: Any, where: str) -> str:
    return f"{where}: {image_name(source)}"
