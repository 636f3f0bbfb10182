"""Greedy answers and log-probabilities from real vLLM, in a process of its own: the reference for exported models.

`python -m mindjax.interop.vllm JOBS.json` reads [[folder, conversations], ...] with conversations in the HF chat
format, and prints, on its last line, a list of answers per folder in the form of `mindjax generate --json`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

# What vLLM 0.32 needs on a machine without a GPU; read when it is imported, so it must stand before.
ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(min(8, os.cpu_count() or 1)),
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, half the start
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


Messages = Sequence[Mapping[str, Any]]


def greedy(
    jobs: Sequence[tuple[str | os.PathLike[str], Sequence[Messages]]],
    *,
    max_new_tokens: int,
    forbidden_tokens: Sequence[int] = (),
    dtype: str = "float32",
    engine: Mapping[str, Any] | None = None,
    timeout: float = 300.0,
) -> list[list[dict[str, Any]]]:
    """Runs vLLM on model folders, one after another in one process, and returns greedy answers, stop tokens ignored.

    Args:
      jobs: pairs of a model folder (weights, config, tokenizer, processor; head_dim 64 or 128, which vLLM's CPU
        attention asks) and the conversations it shall answer: messages in the HF chat format, images as paths.
      max_new_tokens: length of every answer.
      forbidden_tokens: ids that are never drawn.
      dtype: float32 or bfloat16.
      engine: more arguments of `vllm.LLM`, such as {"kv_cache_dtype": "fp8"}.
      timeout: seconds.

    Returns:
      For each folder, for each conversation: prompt_token_ids, prompt_logprobs (None first), token_ids, logprobs, text.

    Raises:
      RuntimeError: where vLLM fails, with the end of what it printed.
      ModuleNotFoundError: where there is none.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([[str(folder), conversations] for folder, conversations in jobs], file)
        file.flush()
        command = [sys.executable, "-m", "mindjax.interop.vllm", file.name, "--dtype", dtype]
        command += ["--max-new-tokens", str(max_new_tokens), "--forbidden-tokens", *map(str, forbidden_tokens)]
        command += ["--engine", json.dumps(dict(engine or {}))]
        done = subprocess.run(
            command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=timeout
        )
    if done.returncode:
        raise RuntimeError(f"vLLM failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _with_pictures(messages: Messages) -> list[dict[str, Any]]:
    """The same messages with opened images, as `LLM.chat` takes them."""
    from PIL import Image

    def part(item: Mapping[str, Any]) -> dict[str, Any]:
        if item["type"] == "image":
            return {"type": "image_pil", "image_pil": Image.open(item["image"]).convert("RGB")}
        return dict(item)

    return [
        {**message, "content": [part(item) for item in message["content"]]}
        if isinstance(message["content"], list)
        else dict(message)
        for message in messages
    ]


def start(folder: str | os.PathLike[str], dtype: str, **engine: Any) -> LLM:
    """An engine in this process, whose environment holds `ENVIRONMENT` since before vLLM was imported."""
    from vllm import LLM

    settings = {
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"image": 4, "video": 0},
        "seed": 0,
    }
    return LLM(model=str(folder), dtype=dtype, **{**settings, **engine})


def stop() -> None:
    """Lets the next engine start in this process, once the caller has let go of the last one."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def answer(
    llm: LLM,
    conversations: Sequence[Messages],
    max_new_tokens: int,
    forbidden_tokens: Sequence[int] = (),
    *,
    prompt_logprobs: bool = True,
) -> list[dict[str, Any]]:
    """Greedy answers of an engine, see `greedy`; with `prompt_logprobs` it reads no cached prefix."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=max_new_tokens,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if prompt_logprobs else None,
        logit_bias=dict.fromkeys(forbidden_tokens, -100.0) or None,
        detokenize=True,
    )
    answers = []
    for output in llm.chat([_with_pictures(messages) for messages in conversations], sampling, use_tqdm=False):
        completion = output.outputs[0]
        steps = output.prompt_logprobs or [None] * len(output.prompt_token_ids)
        prompt = [
            None if step is None else step[token].logprob
            for token, step in zip(output.prompt_token_ids, steps, strict=True)
        ]
        answers.append(
            {
                "prompt_token_ids": list(output.prompt_token_ids),
                "prompt_logprobs": prompt,
                "token_ids": list(completion.token_ids),
                "logprobs": [
                    step[token].logprob for token, step in zip(completion.token_ids, completion.logprobs, strict=True)
                ],
                "text": completion.text,
            }
        )
    return answers


def _answer(folder: str, conversations: Sequence[Messages], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    llm = start(folder, arguments.dtype, **json.loads(arguments.engine))
    answers = answer(llm, conversations, arguments.max_new_tokens, arguments.forbidden_tokens)
    del llm
    stop()
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy answers of model folders by vLLM, as JSON.")
    parser.add_argument("jobs", help="JSON file, [[folder, [messages, ...]], ...]")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--forbidden-tokens", type=int, nargs="*", default=[])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine", default="{}", help="JSON object, more arguments of vllm.LLM")
    arguments = parser.parse_args()
    jobs = json.loads(Path(arguments.jobs).read_text())
    print(json.dumps([_answer(folder, conversations, arguments) for folder, conversations in jobs]))


if __name__ == "__main__":
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    main()
