"""Rollouts by vLLM: a `RolloutEngine` over worker processes, here or elsewhere, whose weights change in place.

A worker is `python -m mindjax.interop.vllm_worker`, spoken to over HTTP. It is given exact token ids and the patches
that the trainer sees, so that nothing is rendered or resized twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.config import ModelConfig
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered
from mindjax.inference.quantized import FORMATS, quantize_params
from mindjax.inference.sampler import SamplingConfig
from mindjax.interop.vllm_client import Lost, Worker
from mindjax.interop.vllm_worker import TOKEN, pack
from mindjax.models import hf_weights
from mindjax.ops.quantize import Quantized, dequantize
from mindjax.types import Array, Completion

Params = dict[str, Any]
Weights = Literal["full", "int8", "fp8"]
SHARED_MEMORY = Path("/dev/shm")


class VLLMEngine:
    """Samples answers in vLLM worker processes; a `mindjax.rl.engine.RolloutEngine`.

    Weights: an update writes them once, to shared memory where there is room, and every worker reads them in place,
    without a restart; whatever it cached of old ones is forgotten. Workers elsewhere get the same files over HTTP.
    Every answer names the weights that it is of, and one of other weights is never taken: all answers of a call of
    `generate` are of the weights of the last `update`, whose number `version` tells.

    8 bits: with `weights` "int8" or "fp8" the products of the language model's layers have the weights that
    `mindjax.inference.quantized` gives the native engine. vLLM on a processor is sent these as floats and computes in
    `dtype`: an emulation of the weights, with neither the speed nor the 8-bit activations. Local workers on a GPU
    quantise what they are sent once more while loading, by the same blocks, and use vLLM's 8-bit kernels: int8 weights
    with activations in `dtype`, fp8 weights and activations.

    Random numbers: each sample has a seed made from its key. A key, a prompt and the weights give the same answer,
    as far as vLLM's logits do: products of batches of another size are summed in another order, which moves
    log-probabilities by about 1e-6 in float32 and 1e-2 in bfloat16, and turns a draw that lies so close to a boundary.
    The numbers are not those of the native engine.

    Failures: a worker that dies, or gives no sign of life for `timeout` seconds, is replaced. What it had answered
    stays, what it had not is asked for again, with the current weights. With workers elsewhere the others take over,
    and a lost one is tried again at each update.
    """

    def __init__(
        self,
        config: ModelConfig,
        processor: Processor,
        params: Params,
        *,
        weights: Weights = "full",
        workers: int = 1,
        urls: Sequence[str] = (),
        token: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        max_rows: int = 64,
        timeout: float = 300.0,
        start_timeout: float = 900.0,
        max_losses: int = 3,
        environments: Sequence[Mapping[str, str]] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts the workers and returns; the first use waits until they are ready.

        Args:
          config: of the model; vLLM's attention on a processor asks for a head_dim of 64 or 128.
          processor: is written beside the weights, as vLLM wants a whole model folder.
          params: the first weights, version 0.
          weights: "full", or "int8" or "fp8" for the language model's layers.
          workers: local processes, where there are no `urls`.
          urls: of workers that were started elsewhere on a folder of this model, as "http://host:port".
          token: the secret of the workers at `urls`, by default from the environment (`vllm_worker.TOKEN`).
          dtype: "float32" or "bfloat16", of the computation; by default that of the parameters.
          max_length: the longest prompt with its answer, in tokens; by default 4,096, or what the model allows.
          max_rows: samples that a worker has in progress at once.
          timeout: seconds without a sign of life after which a worker counts as hung.
          start_timeout: seconds that a worker may take to start, or to read new weights.
          max_losses: of a worker in a row, without an answer between them, before this is an error.
          environments: of each local worker, such as [{"CUDA_VISIBLE_DEVICES": "1"}].
          settings: more arguments of `vllm.LLM`, of local workers.

        Raises:
          ValueError: for settings that do not go together, or parameters that are not those of `config`.
        """
        if weights not in ("full", *FORMATS):
            raise ValueError(f"weights must be full, int8 or fp8, not {weights!r}")
        if not urls and workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}; or give urls of workers elsewhere")
        token = token or (os.environ.get(TOKEN) if urls else secrets.token_urlsafe())
        if not token:
            raise ValueError(f"workers at urls have a secret: set {TOKEN} to it, here and where they start")
        self._config, self._weights = config, weights
        self._dtype = dtype or str(params["text"]["norm"].dtype)
        self._max_length = max_length or min(4096, config.text.max_position_embeddings)
        self._timeout, self._start_timeout = timeout, start_timeout
        self._max_losses = max_losses
        self._settings = {
            "max_model_len": self._max_length,
            "max_num_seqs": max_rows,
            "limit_mm_per_prompt": {"image": 1, "video": 0},  # what memory is set aside for, no limit on patches
            **(settings or {}),
        }
        self.version = -1
        self._tag = ""  # of the weights in the folder, another one at each update
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._workers = [Worker.at(url, token) for url in urls]
        self._home = Path(tempfile.mkdtemp(prefix="mindjax-vllm-"))
        self._folder = _room(self._home, params, self._dtype) / "model"
        for number in range(0 if urls else workers):
            environment = environments[number] if number < len(environments) else {}
            self._workers.append(Worker(f"worker {number}", token, self._home, environment=environment))
        self._removed = [self._home, self._folder.parent]
        self._finalizer = weakref.finalize(self, _clean_up, self._workers, self._removed)
        try:
            processor.save_pretrained(self._folder)
            self._write(params, 0)
            for worker in self._workers:
                if not worker.remote:
                    self._spawn(worker)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the local workers, None for one that is not running."""
        return [worker.pid for worker in self._workers if not worker.remote]

    def update(self, params: Params, version: int) -> None:
        """Replaces the weights of all workers; see `RolloutEngine`.

        Raises:
          ValueError: where the parameters are not those of the model.
          RuntimeError: where a worker keeps dying, with the end of what it printed.
        """
        with self._lock:
            self._check_open()
            # A worker that is starting is reading the folder.
            starting = [worker for worker in self._workers if worker.pid is not None]
            self._everywhere(starting, lambda worker: worker.ready(self._start_timeout, self._closed))
            self._write(params, version)
            self._everywhere(self._workers, self._bring_up_to_date)

    def generate(self, prompts: Sequence[Rendered], sampling: SamplingConfig, keys: Array) -> list[list[Completion]]:
        """Answers to each prompt; see `RolloutEngine`.

        The pictures are the patches of the prompts. Where `sampling` limits by top_k or top_p, greedy answers still
        report log-probabilities over the whole vocabulary.

        Raises:
          ValueError: for keys of a wrong shape, prompts that are too long, or videos.
          RuntimeError: where a worker keeps dying, with the end of what it printed.
        """
        samples = sampling.num_samples
        if keys.shape != (len(prompts), samples):
            raise ValueError(f"keys have shape {keys.shape}; give one per prompt and sample, {len(prompts), samples}")
        asked = [Prompt.of(prompt, self._config.vision.spatial_merge_size) for prompt in prompts]
        longest = max((len(prompt.tokens) for prompt in asked), default=0) + sampling.max_new_tokens
        if longest > self._max_length:
            raise ValueError(
                f"a prompt and its answer take up to {longest} tokens and the engine was made for {self._max_length}; "
                "raise max_length, or lower max_new_tokens"
            )
        seeds = seeds_of(keys)
        answers: dict[tuple[int, int], Completion] = {}
        wanted = [(p, n) for p in range(len(asked)) for n in range(samples)]
        with self._lock:
            while missing := [place for place in wanted if place not in answers]:
                self._check_open()
                # A server elsewhere that was lost stays out, as long as there are others.
                workers = [w for w in self._workers if not (w.remote and w.losses)] or self._workers
                shares = dict(zip((w.name for w in workers), _shares(missing, len(workers)), strict=True))

                def ask(worker: Worker, shares: Mapping[str, Any] = shares) -> None:
                    if share := shares[worker.name]:
                        self._bring_up_to_date(worker)
                        self._ask(worker, share, asked, sampling, seeds, answers)

                self._everywhere(workers, ask)
        return [[answers[p, n] for n in range(samples)] for p in range(len(prompts))]

    def close(self) -> None:
        """Ends local workers and frees the memory of the weights; workers elsewhere stay. May be called again."""
        self._closed.set()
        self._finalizer()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise ValueError("this engine is closed; make a new one")

    def _write(self, params: Params, version: int) -> None:
        if self._weights != "full":
            params = rounded(params, self._config, self._weights)
        hf_weights.save(self._folder, self._config, params, dtype=self._dtype)
        self.version, self._tag = version, f"{version}-{secrets.token_hex(8)}"

    def _spawn(self, worker: Worker) -> None:
        arguments = ["--dtype", self._dtype, "--weights", self._weights, "--version", self._tag]
        worker.spawn(self._folder, [*arguments, "--engine", json.dumps(self._settings)], self._removed)
        if self._closed.is_set():
            worker.end()

    def _bring_up_to_date(self, worker: Worker) -> None:
        """Returns once the worker is ready and has the weights of the folder."""
        if not worker.remote and worker.pid is None:
            self._spawn(worker)
        if worker.ready(self._start_timeout, self._closed) == self._tag:
            return
        order: dict[str, Any] = {"version": self._tag, "folder": str(self._folder)}
        if worker.remote:
            files = sorted(self._folder.glob("*.safetensors"))
            for path in files:
                with path.open("rb") as body:
                    worker.request("PUT", f"/weights/{path.name}", body, self._start_timeout)
            order = {"version": self._tag, "files": [path.name for path in files]}
        for _ in worker.lines("/update", json.dumps(order).encode(), self._start_timeout):
            pass

    def _ask(
        self,
        worker: Worker,
        share: Sequence[tuple[int, int]],
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: np.ndarray,
        answers: dict[tuple[int, int], Completion],
    ) -> None:
        """Adds the answers of a share, (prompt, sample), as they come."""
        numbers = sorted({p for p, _ in share})
        header = {
            "version": self._tag,
            "prompts": [{"tokens": prompts[p].tokens, "pictures": prompts[p].pictures} for p in numbers],
            "samples": [(numbers.index(p), int(seeds[p, n])) for p, n in share],
            "sampling": {
                "max_new_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "stop_token_ids": [] if sampling.ignore_eos else list(sampling.stop_token_ids),
                "repeat_window": sampling.repeat_window,
                "repeat_count": sampling.repeat_count,
                "repeat_length": sampling.repeat_length,
            },
        }
        patches = {key: array for p in numbers for key, array in prompts[p].patches.items()}
        for line in worker.lines("/generate", pack(header, patches), self._timeout):
            if line["version"] != self._tag:
                raise Lost(f"{worker.name} answered with weights {line['version']}, not {self._tag}")
            answer = Completion(tuple(line["tokens"]), tuple(line["logprobs"]), line["reason"])
            answers.setdefault(share[line["sample"]], answer)
            worker.losses = 0

    def _everywhere(self, workers: Sequence[Worker], work: Callable[[Worker], object]) -> None:
        """Runs `work` on workers, all at once. One that is lost is ended; the next use starts a local one again.

        Raises:
          RuntimeError: where one was lost too often in a row, and it is ours or the last.
        """
        given_up = threading.Event()

        def guarded(worker: Worker) -> None:
            try:
                work(worker)
                worker.losses = 0
            except Lost as loss:
                if given_up.is_set() or self._closed.is_set():
                    return
                worker.losses += 1
                worker.end()
                others = worker.remote and any(not other.losses for other in self._workers)
                if worker.losses >= self._max_losses and not others:
                    raise RuntimeError(
                        f"vLLM failed {worker.losses} times in a row; the last time, {loss}\n{worker.last_output()}"
                    ) from loss
                if worker.remote:
                    self._closed.wait(worker.losses)  # it may be starting again

        with ThreadPoolExecutor(max(1, len(workers))) as pool:
            futures = [pool.submit(guarded, worker) for worker in workers]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                given_up.set()
                for worker in workers:
                    worker.hang_up()
                raise


def make_engine(run: Any, config: ModelConfig, params: Params, processor: Processor, **options: Any) -> VLLMEngine:
    """The engine that a run of RL asks for.

    Args:
      run: a `mindjax.rl.config.RLConfig`; its `rollout` and `dtype` are read.
      config, params, processor: the policy.
      options: more of `VLLMEngine`'s arguments, such as max_length.
    """
    rollout = run.rollout
    return VLLMEngine(
        config, processor, params,
        weights=rollout.weights, workers=rollout.workers, urls=rollout.urls, dtype=run.dtype, **options,
    )  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A request as a worker gets it.

    Attributes:
      tokens: with every picture's placeholders.
      pictures: {"key", "offset" of its first placeholder, "grid"} of each.
      patches: key -> [n, P] float32; the key is made from the numbers, so that equal pictures are encoded once.
    """

    tokens: list[int]
    pictures: list[dict[str, Any]]
    patches: dict[str, np.ndarray]

    @classmethod
    def of(cls, rendered: Rendered, merge_size: int) -> Prompt:
        """Raises ValueError for videos."""
        if np.any(rendered.modality == 2):
            raise ValueError("vLLM rollouts take pictures and no videos; use the native engine, or frames as pictures")
        places = np.flatnonzero(rendered.modality == 1)
        pictures: list[dict[str, Any]] = []
        patches = {}
        for values, grid in rendered.frames:
            values = np.ascontiguousarray(values, np.float32)
            key = hashlib.blake2b(values.tobytes() + repr(grid).encode(), digest_size=16).hexdigest()
            patches[key] = values
            pictures.append({"key": key, "offset": int(places[0]), "grid": [int(side) for side in grid]})
            places = places[grid[0] * grid[1] // merge_size**2 :]
        assert not len(places), "placeholders without a picture"
        return cls(rendered.tokens.tolist(), pictures, patches)


def seeds_of(keys: Array) -> np.ndarray:
    """A seed in [0, 2^63) for each PRNG key, of the same shape: a hash, as generators read the low bits alone."""
    words = np.asarray(jax.random.key_data(keys))
    flat = words.reshape(keys.size, -1)
    seeds = [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest()) >> 1 for row in flat]
    return np.asarray(seeds, np.int64).reshape(keys.shape)


def rounded(params: Params, config: ModelConfig, weights: Literal["int8", "fp8"]) -> Params:
    """The parameters with the layers' products rounded to what `quantize_params` makes of them, as floats."""

    def restore(leaf: Any) -> Any:
        return _restore(leaf, params["text"]["embed"].dtype) if isinstance(leaf, Quantized) else leaf

    quantised = quantize_params(params, config, weights)
    return jax.tree.map(restore, quantised, is_leaf=lambda leaf: isinstance(leaf, Quantized))


@partial(jax.jit, static_argnums=1)
def _restore(stack: Quantized, dtype: Any) -> Array:
    """[..., outputs, inputs] as [..., inputs, outputs]."""
    return dequantize(stack, dtype).swapaxes(-1, -2)


def _shares(missing: Sequence[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    """Splits (prompt, sample) pairs; the samples of a prompt stay together, as they share its computation."""
    shares: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    by_prompt: dict[int, list[tuple[int, int]]] = {}
    for place in missing:
        by_prompt.setdefault(place[0], []).append(place)
    for places in by_prompt.values():
        min(shares, key=len).extend(places)
    return shares


def _room(home: Path, params: Params, dtype: str) -> Path:
    """A folder in shared memory where the weights fit twice, as an update writes them beside the old; else `home`."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) * jnp.dtype(dtype).itemsize
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2.2 * size:
        return Path(tempfile.mkdtemp(prefix="mindjax-vllm-", dir=SHARED_MEMORY))
    return home


def _clean_up(workers: Sequence[Worker], folders: Sequence[Path]) -> None:
    for worker in workers:
        worker.end()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
