"""Run by test_vllm_update in a process of its own, for vLLM reads its environment when it is imported.

`python vllm_update_program.py FOLDER [--processes]`: FOLDER holds old, new and vision checkpoints and
conversations.json. One engine starts on old, is updated, and is compared with engines that start on the others. Prints
its answers as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from mindjax.interop import vllm as engines

if "--processes" in sys.argv:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
for name, value in engines.ENVIRONMENT.items():
    os.environ.setdefault(name, value)

from mindjax.interop.vllm_update import WORKER_EXTENSION, reset_caches, update_weights  # noqa: E402
from mindjax.models import catalog  # noqa: E402

NEW_TOKENS = 12
START: dict[str, Any] = {"dtype": "float32", "enable_prefix_caching": True}


def ask(llm: Any, conversations: list[Any]) -> dict[str, Any]:
    """First as rollouts do, which read the prefix cache, then with the log-probs of the prompt, which does not."""
    cached = engines.answer(llm, conversations, NEW_TOKENS, prompt_logprobs=False)
    return {"cached": cached, "scored": engines.answer(llm, conversations, NEW_TOKENS)}


def main(folder: Path) -> None:
    conversations = json.loads((folder / "conversations.json").read_text())
    models = {name: catalog.load(folder / name, dtype="float32") for name in ("old", "new", "vision")}
    answers = {}

    llm = engines.start(folder / "old", **START)
    answers["old"] = ask(llm, conversations)
    update_weights(llm, *models["new"])
    answers["new updated"] = ask(llm, conversations)
    update_weights(llm, *models["old"])
    answers["old again"] = ask(llm, conversations)

    # Without the reset: new weights, and what the old ones made of the images.
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    runner.reset_encoder_cache = lambda: None
    reset, llm.llm_engine.reset_encoder_cache = llm.llm_engine.reset_encoder_cache, lambda: None
    update_weights(llm, *models["vision"])
    answers["vision stale"] = ask(llm, conversations)
    del runner.reset_encoder_cache
    llm.llm_engine.reset_encoder_cache = reset
    reset_caches(llm)
    answers["vision updated"] = ask(llm, conversations)

    # The other cache: keys and values of prompts.
    llm.reset_prefix_cache, kept = lambda: True, llm.reset_prefix_cache
    update_weights(llm, *models["new"])
    answers["prefix stale"] = ask(llm, conversations)
    llm.reset_prefix_cache = kept

    mistakes = {}
    config, params = models["new"]
    for name, wrong in {
        "missing": {**params, "text": {}},
        "shape": {**params, "vision": models["new"][1]["text"]},
    }.items():
        try:
            update_weights(llm, config, wrong)
        except ValueError as error:
            mistakes[name] = str(error)
    llm.reset_prefix_cache()
    answers["after mistakes"] = ask(llm, conversations)
    answers["mistakes"] = mistakes
    del llm, runner, reset, kept
    print(json.dumps(answers | started(folder, conversations)))


def started(folder: Path, conversations: list[Any]) -> dict[str, Any]:
    """What engines that start on the weights answer."""
    answers = {}
    for name in ("new", "vision"):
        engines.stop()
        llm = engines.start(folder / name, **START)
        answers[f"{name} started"] = ask(llm, conversations)
        del llm
    return answers


def in_processes(folder: Path) -> None:
    """The updates alone, of an engine whose workers share no memory with this process."""
    conversations = json.loads((folder / "conversations.json").read_text())
    llm = engines.start(folder / "old", worker_extension_cls=WORKER_EXTENSION, **START)
    answers = {"old": ask(llm, conversations)}
    for name in ("new", "vision"):
        update_weights(llm, *catalog.load(folder / name, dtype="float32"))
        answers[f"{name} updated"] = ask(llm, conversations)
    del llm
    print(json.dumps(answers | started(folder, conversations)))


if __name__ == "__main__":
    (in_processes if "--processes" in sys.argv else main)(Path(sys.argv[1]))
