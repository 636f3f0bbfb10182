"""`mindjax generate`: one answer to one conversation, for people or, with --json, for programs."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.config import ModelConfig
from mindjax.data.packing import collate_prompts
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered, render
from mindjax.inference.sampler import SamplingConfig, generate, sampling_keys
from mindjax.models import catalog
from mindjax.models.qwen3_vl import Params, token_logprobs
from mindjax.types import Batch


def main(args: argparse.Namespace) -> None:
    """Runs the command.

    Args:
      args: model_dir, messages (a JSON file of HF chat messages), max_new_tokens, temperature, seed, dtype,
        ignore_eos, json. With `json` the last line printed is an object with prompt_token_ids, prompt_logprobs (at
        temperature 1, null for the first token), token_ids, logprobs and text.

    Raises:
      ValueError: the messages cannot be read or rendered, or the folder is no model.
    """
    messages = read_messages(args.messages)
    folder = Path(args.model_dir)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a Hugging Face model folder")
    processor = Processor.from_pretrained(folder)
    config, params = catalog.load(folder, dtype=jnp.dtype(args.dtype))
    prompt = render(messages, processor, add_generation_prompt=True)
    sampling = SamplingConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        stop_token_ids=stop_token_ids(processor, folder),
        ignore_eos=args.ignore_eos,
    )
    keys = sampling_keys(args.seed, 0, [0], 1)
    ((completion,),) = generate(params, config, [prompt], sampling=sampling, keys=keys)
    text = processor.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    if not args.json:
        print(text)
        cut = f", cut at --max-new-tokens {args.max_new_tokens}" if completion.finish_reason == "length" else ""
        print(f"\n[{len(prompt.tokens)} tokens in, {len(completion.token_ids)} out{cut}]")
        return
    result = {
        "prompt_token_ids": prompt.tokens.tolist(),
        "prompt_logprobs": prompt_logprobs(params, config, prompt),
        "token_ids": list(completion.token_ids),
        "logprobs": list(completion.logprobs),
        "text": text,
    }
    print(json.dumps(result))


def read_messages(path: str | Path) -> list[dict[str, Any]]:
    """HF chat messages from a JSON file: a list, or an object that holds it under "messages".

    Raises:
      ValueError: no such file, no JSON, or something else in it.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    messages = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'{path} must hold a list of messages, [{{"role": "user", "content": ...}}, ...]')
    return messages


def stop_token_ids(processor: Processor, folder: Path | None = None) -> tuple[int, ...]:
    """The tokens that end a reply: <|im_end|>, <|endoftext|>, and what the folder's generation_config.json names."""
    stop = {processor.im_end_token_id, processor.endoftext_token_id}
    path = None if folder is None else folder / "generation_config.json"
    if path is not None and path.is_file():
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        stop |= {int(token) for token in (named if isinstance(named, list) else [named]) if token is not None}
    return tuple(sorted(stop))


def prompt_logprobs(params: Params, config: ModelConfig, prompt: Rendered) -> list[float | None]:
    """Log-probability of every prompt token given those before it, at temperature 1; None for the first."""
    batch = collate_prompts([prompt], merge_size=config.vision.spatial_merge_size)
    logp = np.asarray(_logprobs(params, batch, config=config))[0, : len(prompt.tokens)]
    return [None, *logp[1:].tolist()]


@partial(jax.jit, static_argnames="config")
def _logprobs(params: Params, batch: Batch, *, config: ModelConfig) -> jax.Array:
    return token_logprobs(params, config, batch).logp
