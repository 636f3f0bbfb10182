"""A vLLM engine behind a small HTTP interface: the process that `mindjax.interop.vllm_rollout` talks to.

    MINDJAX_VLLM_TOKEN=secret python -m mindjax.interop.vllm_worker FOLDER --host 0.0.0.0 --port 8000

FOLDER is a model folder (configuration, weights, tokenizer, processor). Every request names the secret, as
`Authorization: Bearer secret`; the connection is not encrypted, so let a worker listen on trusted networks alone.

    GET  /health         {"state": "starting" or "ready", "version": of the weights, "pid": ...}
    POST /generate       body: `pack`ed prompts. One line of JSON per answer as they finish, {"done": true} at the end;
                         while the model works without an answer, empty lines say so.
    PUT  /weights/NAME   body: a safetensors file, kept until the next update
    POST /update         {"version": ..., "folder": on this machine} or {"version": ..., "files": [NAME, ...]}
    POST /close          ends the process

vLLM runs in the main thread, HTTP in others. A failure inside vLLM ends the process: who asked starts another.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hmac
import importlib.metadata
import io
import json
import os
import queue
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mindjax.interop import vllm as engines

if TYPE_CHECKING:
    from vllm import LLM

TOKEN = "MINDJAX_VLLM_TOKEN"
_SHARD = re.compile(r"[\w-]+\.safetensors")
_CHUNK = 1 << 20
_PICTURES = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# Quantisation while loading, where a GPU has kernels for it: scales as in `mindjax.inference.quantized`.
_NATIVE = {"int8": "int8_per_channel_weight_only", "fp8": "fp8_per_block"}
_KEPT = ["visual.*", "*.mlp.gate"]  # the vision encoder and routers; embedding and head are no linear layers to vLLM


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """JSON and arrays as one body; nothing in it can run code."""
    buffer = io.BytesIO()
    named: dict[str, Any] = {**arrays, "header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    np.savez(buffer, **named)
    return buffer.getvalue()


def unpack(body: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The inverse of `pack`."""
    with np.load(io.BytesIO(body), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(arrays.pop("header").tobytes()), arrays


def goes_round(tokens: Sequence[int], window: int, count: int, length: int) -> bool:
    """Whether the newest tokens are a cycle of at most `window` tokens, `count` times over and at least `length` long.

    As `mindjax.inference.redundancy`.
    """
    for period in range(1, min(window, len(tokens)) + 1):
        needed = max(period * (count - 1), length - period)
        if needed + period <= len(tokens) and all(
            tokens[-1 - place] == tokens[-1 - place - period] for place in range(needed)
        ):
            return True
    return False


@dataclass
class Job:
    """Something that HTTP asks of the engine.

    Attributes:
      kind: "generate", "update" or "abort" (of another generate job, `payload`).
      replies: lines for who asked; None ends them.
    """

    kind: str
    payload: Any
    replies: queue.Queue[dict[str, Any] | None] = field(default_factory=queue.Queue)


@dataclass
class State:
    """What both sides of the process look at."""

    version: str
    home: str | None = None
    ready: bool = False
    steps: int = 0
    jobs: queue.Queue[Job] = field(default_factory=queue.Queue)

    @functools.cached_property
    def staging(self) -> Path:
        """Where weights that come over HTTP lie until the update."""
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        return Path(tempfile.mkdtemp(prefix="mindjax-", dir=self.home or memory))


@dataclass
class _Answer:
    """One sample on its way."""

    job: Job
    place: int
    sampling: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Engine:
    """Runs jobs on a vLLM engine until the process ends."""

    def __init__(self, llm: LLM, state: State, merge_size: int) -> None:
        self._llm, self._state, self._merge_size = llm, state, merge_size
        self._running: dict[str, _Answer] = {}
        self._waiting: list[Job] = []  # updates, until nothing is running
        self._count = 0

    def run(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                # Without work it sleeps here; with work it looks whether there is more.
                self._take(self._state.jobs.get(block=not self._running))
            while self._waiting and not self._running:
                self._update(self._waiting.pop(0))
            if self._running:
                self._step()

    def _take(self, job: Job) -> None:
        if job.kind == "update":
            self._waiting.append(job)
        elif job.kind == "abort":
            self._abort([name for name, answer in self._running.items() if answer.job is job.payload])
        elif (asked := job.payload[0]["version"]) != self._state.version or self._waiting:
            job.replies.put({"stale": f"asked for weights {asked}, these are {self._state.version}"})
            job.replies.put(None)
        else:
            try:
                self._add(job)
            except ValueError as error:
                self._abort([name for name, answer in self._running.items() if answer.job is job])
                job.replies.put({"error": str(error)})
                job.replies.put(None)

    def _abort(self, names: list[str]) -> None:
        self._llm.llm_engine.abort_request(names)
        for name in names:
            del self._running[name]

    def _add(self, job: Job) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        header, arrays = job.payload
        sampling = header["sampling"]
        repeats = sampling["repeat_window"] > 0
        inputs = [
            engine_input(prompt["tokens"], prompt["pictures"], arrays, self._merge_size) for prompt in header["prompts"]
        ]
        for place, (prompt, seed) in enumerate(header["samples"]):
            params = SamplingParams(
                temperature=sampling["temperature"],
                top_k=sampling["top_k"],
                top_p=sampling["top_p"],
                max_tokens=sampling["max_new_tokens"],
                stop_token_ids=sampling["stop_token_ids"],
                ignore_eos=True,  # vLLM would add those of the folder; what ends an answer is said above
                seed=seed,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA if repeats else RequestOutputKind.FINAL_ONLY,
            )
            self._count += 1
            name = str(self._count)
            self._running[name] = _Answer(job, place, sampling)
            self._llm.llm_engine.add_request(name, inputs[prompt], params)
        if not header["samples"]:
            job.replies.put(None)

    def _step(self) -> None:
        done = []
        for output in self._llm.llm_engine.step():
            answer = self._running.get(output.request_id)
            if answer is None:
                continue  # given up a step ago
            part = output.outputs[0]
            answer.tokens.extend(part.token_ids)
            answer.logprobs.extend(
                step[token].logprob for token, step in zip(part.token_ids, part.logprobs, strict=True)
            )
            reason = part.finish_reason if output.finished else None
            sampling = answer.sampling
            if reason != "stop" and goes_round(
                answer.tokens, sampling["repeat_window"], sampling["repeat_count"], sampling["repeat_length"]
            ):
                reason = "redundant"
            if reason is not None:
                done.append((output.request_id, reason, output.finished))
        self._state.steps += 1
        for name, reason, finished in done:
            answer = self._running[name]
            if finished:
                del self._running[name]
            else:
                self._abort([name])
            line = {"sample": answer.place, "tokens": answer.tokens, "logprobs": answer.logprobs, "reason": reason}
            answer.job.replies.put({**line, "version": self._state.version})
            if not any(other.job is answer.job for other in self._running.values()):
                answer.job.replies.put(None)

    def _update(self, job: Job) -> None:
        from mindjax.interop.vllm_update import update_from_folder

        # Whatever fails here may leave half of the weights changed, so it ends the process.
        update_from_folder(self._llm, job.payload["folder"])
        self._state.version = job.payload["version"]
        job.replies.put({"version": self._state.version})
        job.replies.put(None)


def engine_input(
    tokens: list[int], pictures: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray], merge_size: int
) -> Any:
    """What vLLM's own processor would make of a prompt, from exact ids and exact patches.

    Args:
      tokens: with as many placeholders as each picture has tokens.
      pictures: {"key": of `arrays`, "offset": of its first placeholder, "grid": (rows, columns) of patches}, in order.
      arrays: patches [rows * columns, P] float32 in merge-block order.
      merge_size: side of a merge block.
    """
    import torch
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    if not pictures:
        return tokens_input(tokens)
    grids = torch.tensor([[1, *picture["grid"]] for picture in pictures])
    fields = {
        "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grids.prod(-1)),
        "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    values = torch.from_numpy(np.concatenate([arrays[picture["key"]] for picture in pictures]))
    lengths = [rows * columns // merge_size**2 for rows, columns in (picture["grid"] for picture in pictures)]
    places = [PlaceholderRange(picture["offset"], length) for picture, length in zip(pictures, lengths, strict=True)]
    return mm_input(
        tokens,
        MultiModalKwargsItems.from_hf_inputs({"pixel_values": values, "image_grid_thw": grids}, fields),
        {"image": [picture["key"] for picture in pictures]},
        {"image": places},
    )


class Handler(BaseHTTPRequestHandler):
    """One request; `state` and `token` are set on a subclass."""

    state: State
    token: str
    timeout = 600  # seconds of silence in a body

    def do_GET(self) -> None:
        if self._allowed() and self.path == "/health":
            state = "ready" if self.state.ready else "starting"
            self._answer({"state": state, "version": self.state.version, "pid": os.getpid()})

    def do_PUT(self) -> None:
        name = self.path.removeprefix("/weights/")
        if not self._allowed():
            return
        if not _SHARD.fullmatch(name):
            self.send_error(404)
            return
        left = int(self.headers["Content-Length"])
        with (self.state.staging / name).open("wb") as file:
            while left:
                chunk = self.rfile.read(min(left, _CHUNK))
                if not chunk:
                    return
                left -= file.write(chunk)
        self._answer({})

    def do_POST(self) -> None:
        if not self._allowed():
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/close":
            self._answer({})
            os.kill(os.getpid(), signal.SIGKILL)
        elif not self.state.ready:
            self.send_error(503, "vLLM is starting")
        elif self.path == "/generate":
            self._stream(Job("generate", unpack(body)))
        elif self.path == "/update":
            order = json.loads(body)
            if "files" in order:
                self._keep(order["files"])
                order["folder"] = str(self.state.staging)
            self._stream(Job("update", order))
            if "files" in order:
                self._keep([])
        else:
            self.send_error(404)

    def _keep(self, files: Sequence[str]) -> None:
        """Of what was PUT, these alone stay."""
        for path in self.state.staging.iterdir():
            if path.name not in files:
                path.unlink()

    def _stream(self, job: Job) -> None:
        self.send_response(200)
        self.end_headers()
        self.state.jobs.put(job)
        steps = self.state.steps
        try:
            while True:
                try:
                    line = job.replies.get(timeout=1.0)
                except queue.Empty:
                    if self.state.steps != steps:
                        self._write(b"\n")
                    steps = self.state.steps
                    continue
                if line is None:
                    break
                self._write(json.dumps(line).encode() + b"\n")
            self._write(b'{"done": true}\n')
        except OSError:  # nobody listens any more
            self.state.jobs.put(Job("abort", job))

    def _write(self, line: bytes) -> None:
        self.wfile.write(line)
        self.wfile.flush()

    def _answer(self, value: Mapping[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _allowed(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        if hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            return True
        self.send_error(401)
        return False

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _end_with(parent: int, folders: Sequence[str]) -> None:
    """Ends this process, and removes what the parent can no longer remove, when the parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def start(folder: Path, arguments: argparse.Namespace) -> tuple[LLM, int]:
    """The engine, and the side of a merge block."""
    for name, value in engines.ENVIRONMENT.items():
        if _without_gpu() or not name.startswith(("VLLM_CPU", "VLLM_TARGET", "OMP")):
            os.environ.setdefault(name, value)
    # The second version of the model runner, vLLM's choice on GPUs, samples elsewhere.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    from mindjax.interop.vllm_update import WORKER_EXTENSION

    settings: dict[str, Any] = {
        "enforce_eager": _without_gpu(),
        "enable_prefix_caching": True,  # the samples of a prompt share it
        # Pictures come as patches that are normalised already.
        "mm_processor_cache_gb": 0,
        "mm_device_do_normalize": False,
        "worker_extension_cls": WORKER_EXTENSION,
        "generation_config": "vllm",  # not the folder's temperatures
    }
    if arguments.weights in _NATIVE and not _without_gpu():
        settings |= {"quantization": _NATIVE[arguments.weights], "quantization_config": {"ignore": _KEPT}}
    llm = engines.start(folder, arguments.dtype, **{**settings, **json.loads(arguments.engine)})
    model = json.loads((folder / "config.json").read_text())
    llm.collective_rpc("use_policy_sampler", args=([model[name] for name in _PICTURES],))
    return llm, model["vision_config"]["spatial_merge_size"]


def _without_gpu() -> bool:
    """Whether the installed vLLM is the one for processors."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves a vLLM engine to the rollouts of mindjax.")
    parser.add_argument("folder", type=Path, help="a model folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--port-file", type=Path, help="where to write the port")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", choices=["full", *_NATIVE], default="full", help="8 bits where a GPU has them")
    parser.add_argument("--version", default="", help="of the folder's weights")
    parser.add_argument("--engine", default="{}", help="JSON object, more arguments of vllm.LLM")
    parser.add_argument("--parent", type=int, help="process to end with")
    parser.add_argument("--remove", nargs="*", default=[], help="folders to remove when it has ended")
    arguments = parser.parse_args()
    token = os.environ.get(TOKEN)
    if not token:
        parser.error(f"set {TOKEN} to a secret that the trainer knows")
    if arguments.parent:
        threading.Thread(target=_end_with, args=(arguments.parent, arguments.remove), daemon=True).start()
    # Where who started it cleans up, for it may be killed.
    state = State(arguments.version, home=arguments.remove[-1] if arguments.remove else None)
    handler = type("Handler", (Handler,), {"state": state, "token": token})
    server = ThreadingHTTPServer((arguments.host, arguments.port), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if arguments.port_file:
        written = arguments.port_file.with_suffix(".new")
        written.write_text(str(server.server_address[1]))
        written.rename(arguments.port_file)
    llm, merge_size = start(arguments.folder, arguments)
    state.ready = True
    Engine(llm, state, merge_size).run()


if __name__ == "__main__":
    main()
