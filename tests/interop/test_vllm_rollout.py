"""Rollouts by real vLLM workers: log-probs of the trainer before and after updates, and workers that die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from mindjax.config import ModelConfig
from mindjax.data.packing import collate_prompts
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered, append_completion, render
from mindjax.inference.sampler import SamplingConfig, generate, sampling_keys
from mindjax.interop.vllm_client import Worker
from mindjax.interop.vllm_rollout import VLLMEngine, rounded, seeds_of
from mindjax.interop.vllm_worker import goes_round, unpack
from mindjax.models import qwen3_vl
from mindjax.types import Completion
from tests.interop.vllm_rollout_program import TEXTS, make_config, make_engine, make_params, make_processor

PROGRAM = Path(__file__).with_name("vllm_rollout_program.py")
# Two float32 programs of the same sums; found 6e-6 at most.
ATOL = 2e-5


@dataclass
class Pair:
    """An engine, and what it samples from: two sets of weights, of version 0 and 1, it starts on the first."""

    engine: VLLMEngine
    config: ModelConfig
    processor: Processor
    params: list[dict[str, Any]]
    prompts: list[Rendered]


def picture(width: int, height: int, seed: int) -> dict[str, Any]:
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return {"type": "image", "image": coarse.resize((width, height), Image.Resampling.BICUBIC)}


def make_prompts(processor: Processor) -> list[Rendered]:
    """A picture that is resized; two pictures in two turns, of which one was sampled; text longer than a block."""
    image, other = picture(90, 60, 0), picture(32, 80, 1)
    first = [{"role": "user", "content": [image, {"type": "text", "text": TEXTS[0]}]}]
    second = [{"role": "user", "content": [{"type": "text", "text": TEXTS[1]}, other, image]}]
    long = [{"role": "user", "content": " ".join(TEXTS * 4)}]
    prompts = [render(messages, processor, add_generation_prompt=True) for messages in (first, second, long)]
    # Ids that no text is tokenized to: vLLM must take them as they are.
    prompts[1] = append_completion(prompts[1], [83, 84, 82, 68, 81, 83, 84])
    return prompts


@pytest.fixture(scope="module")
def pairs() -> Iterator[dict[str, Pair]]:
    processor, pairs = make_processor(), {}
    with contextlib.ExitStack() as stack:
        for kind in ("dense", "moe"):
            config = make_config(processor, moe=kind == "moe")
            params = [make_params(config, seed) for seed in (0, 1)]
            engine = make_engine(config, processor, params[0])
            stack.callback(engine.close)
            pairs[kind] = Pair(engine, config, processor, params, make_prompts(processor))
        yield pairs


@pytest.fixture(params=["dense", "moe"])
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    return pairs[request.param]


def trainer_logprobs(
    config: ModelConfig, params: Any, prompts: list[Rendered], answers: list[list[Completion]], temperature: float
) -> list[list[np.ndarray]]:
    """What the training forward gives the sampled tokens."""
    full = [append_completion(p, c.token_ids) for p, group in zip(prompts, answers, strict=True) for c in group]
    batch = collate_prompts(full, length=256, merge_size=config.vision.spatial_merge_size)
    logp = np.asarray(
        jax.jit(qwen3_vl.token_logprobs, static_argnums=1)(params, config, batch, temperature=temperature).logp
    )
    rows = iter(logp)
    return [
        [next(rows)[len(p.tokens) : len(p.tokens) + len(c.token_ids)] for c in group]
        for p, group in zip(prompts, answers, strict=True)
    ]


def distance(answers: list[list[Completion]], logprobs: list[list[np.ndarray]]) -> float:
    return max(
        float(np.abs(np.asarray(c.logprobs) - logp).max())
        for group, rows in zip(answers, logprobs, strict=True)
        for c, logp in zip(group, rows, strict=True)
    )


def tokens(answers: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in group] for group in answers]


def test_logprobs_are_the_trainers_before_and_after_updates(pair: Pair) -> None:
    """At a temperature, pictures in the prompt; the numbers of both weights differ by far more than the bound."""
    # Hot, so that the picture tokens have a mass that would show if it were renormalised away.
    sampling = SamplingConfig(max_new_tokens=16, temperature=2.0, num_samples=2)
    keys = sampling_keys(0, 0, [0, 1, 2], 2)
    pair.engine.update(pair.params[0], 0)
    answers = {}
    for name, version in (("first", 0), ("second", 1), ("first again", 0)):
        if name != "first":
            pair.engine.update(pair.params[version], version)
        assert pair.engine.version == version
        answers[name] = pair.engine.generate(pair.prompts, sampling, keys)
        right, wrong = (
            trainer_logprobs(pair.config, params, pair.prompts, answers[name], 2.0)
            for params in (pair.params[version], pair.params[1 - version])
        )
        assert distance(answers[name], right) < ATOL
        assert min(distance([group], [rows]) for group, rows in zip(answers[name], wrong, strict=True)) > 0.05
        assert {c.finish_reason for group in answers[name] for c in group} == {"length"}
    assert answers["first again"] == answers["first"]
    assert tokens(answers["second"]) != tokens(answers["first"])


def test_greedy_answers_are_those_of_the_native_sampler(pair: Pair) -> None:
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0)
    keys = sampling_keys(0, 0, [0, 1, 2], 1)
    pair.engine.update(pair.params[0], 0)
    native = generate(pair.params[0], pair.config, pair.prompts, sampling=sampling)
    answers = pair.engine.generate(pair.prompts, sampling, keys)
    assert tokens(answers) == tokens(native)
    assert distance(answers, [[np.asarray(c.logprobs) for c in group] for group in native]) < ATOL
    # A token that ends answers is their last one, and counts.
    stop = native[0][0].token_ids[5]
    stopped = SamplingConfig(max_new_tokens=12, temperature=0.0, stop_token_ids=(stop,))
    native = generate(pair.params[0], pair.config, pair.prompts, sampling=stopped)
    answers = pair.engine.generate(pair.prompts, stopped, keys)
    assert native[0][0].finish_reason == "stop" and native[0][0].token_ids[-1] == stop
    assert [[(c.token_ids, c.finish_reason) for c in group] for group in answers] == [
        [(c.token_ids, c.finish_reason) for c in group] for group in native
    ]


def test_sampled_tokens_follow_the_distribution(pairs: dict[str, Pair]) -> None:
    """First tokens of many samples against the trainer's probabilities; picture tokens never, limits renormalised."""
    pair, count = pairs["moe"], 600
    # A head that likes to draw a picture's placeholder.
    params = pair.params[1]
    head = params["text"]["head"].at[:, pair.config.image_token_id].set(params["text"]["head"][:, 70])
    params = {**params, "text": {**params["text"], "head": head}}
    pair.engine.update(params, 2)
    prompt = pair.prompts[0]
    scores = first_scores(params, pair.config, prompt) / 0.9
    pictures = [getattr(pair.config, f"{name}_token_id") for name in ("image", "video", "vision_start", "vision_end")]
    for top_k in (0, 5):
        sampling = SamplingConfig(max_new_tokens=1, temperature=0.9, top_k=top_k, num_samples=count)
        (answers,) = pair.engine.generate([prompt], sampling, sampling_keys(3, top_k, [0], count))
        drawn = np.asarray([c.token_ids[0] for c in answers])
        assert not np.isin(drawn, pictures).any()
        allowed = scores.copy()
        allowed[pictures] = -np.inf
        if top_k:
            allowed[allowed < np.sort(allowed)[-top_k]] = -np.inf
        normaliser = np.logaddexp.reduce(allowed if top_k else scores)
        np.testing.assert_allclose([c.logprobs[0] for c in answers], allowed[drawn] - normaliser, rtol=0, atol=ATOL)
        expected = np.exp(allowed - np.logaddexp.reduce(allowed))
        likely = np.argsort(expected)[-5:]
        shares = np.asarray([(drawn == token).mean() for token in likely])
        deviation = np.sqrt(expected[likely] * (1 - expected[likely]) / count)
        assert (np.abs(shares - expected[likely]) < 4 * deviation).all()


def first_scores(params: Any, config: ModelConfig, prompt: Rendered) -> np.ndarray:
    """[V] float64 logits after the prompt."""
    batch = collate_prompts([prompt], merge_size=config.vision.spatial_merge_size)
    hidden = jax.jit(qwen3_vl.forward, static_argnums=1)(params, config, batch).hidden[0, len(prompt.tokens) - 1]
    return np.asarray(qwen3_vl.logits(params, hidden[None])[0], np.float64)


def test_an_answer_depends_on_its_key_and_prompt_alone(pairs: dict[str, Pair]) -> None:
    pair = pairs["dense"]
    sampling = SamplingConfig(max_new_tokens=12, num_samples=3)
    keys = sampling_keys(1, 0, [0, 1, 2], 3)
    answers = tokens(pair.engine.generate(pair.prompts, sampling, keys))
    order = np.asarray([2, 0])
    assert tokens(pair.engine.generate([pair.prompts[i] for i in order], sampling, keys[order])) == [
        answers[i] for i in order
    ]
    assert tokens(pair.engine.generate(pair.prompts, sampling, keys[:, ::-1])) == [group[::-1] for group in answers]
    assert len({answer for group in answers for answer in group}) == 9


def test_answers_that_go_round_are_cut_as_by_the_native_sampler(pairs: dict[str, Pair]) -> None:
    pair = pairs["dense"]
    params = make_params(pair.config, 0, embedding=0.5)
    pair.engine.update(params, 3)
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.0, "repeat_window": 6, "repeat_count": 3}
    for sampling in (SamplingConfig(**options), SamplingConfig(**options, repeat_length=20)):
        native = generate(params, pair.config, pair.prompts, sampling=sampling)
        answers = pair.engine.generate(pair.prompts, sampling, sampling_keys(0, 0, [0, 1, 2], 1))
        assert [(a[0].token_ids, a[0].finish_reason) for a in answers] == [
            (n[0].token_ids, n[0].finish_reason) for n in native
        ]
        assert "redundant" in {n[0].finish_reason for n in native}


@pytest.mark.parametrize("weights", ["full", "int8", "fp8"])
def test_a_server_elsewhere_gets_weights_over_http(pairs: dict[str, Pair], weights: Any) -> None:
    """The worker of one engine, used by another one by its address: what it answers is of the other's weights."""
    pair = pairs["moe"]
    pair.engine.update(pair.params[0], 0)
    (worker,) = pair.engine._workers
    sampling, keys = SamplingConfig(max_new_tokens=12, num_samples=2), sampling_keys(2, 0, [0, 1, 2], 2)
    mine = pair.engine.generate(pair.prompts, sampling, keys)
    other = VLLMEngine(
        pair.config, pair.processor, pair.params[1],
        weights=weights, urls=[f"http://127.0.0.1:{worker.port}"], token=worker.token, max_length=512,
    )  # fmt: skip
    with contextlib.closing(other):
        answers = other.generate(pair.prompts, sampling, keys)
    params = pair.params[1] if weights == "full" else rounded(pair.params[1], pair.config, weights)
    assert distance(answers, trainer_logprobs(pair.config, params, pair.prompts, answers, 1.0)) < ATOL
    if weights != "full":
        assert distance(answers, trainer_logprobs(pair.config, pair.params[1], pair.prompts, answers, 1.0)) > 1e-3
    # Closing the other leaves the worker alone, and the first one notices that the weights are no longer its own.
    assert pair.engine.generate(pair.prompts, sampling, keys) == mine


def test_a_worker_that_is_killed_is_replaced_and_no_sample_lost_or_taken_twice(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pairs["dense"]
    pair.engine.update(pair.params[1], 7)
    stop = tuple(range(64, 70))  # answers of many lengths
    sampling = SamplingConfig(max_new_tokens=100, num_samples=8, stop_token_ids=stop)
    keys = sampling_keys(5, 0, [0, 1, 2], 8)
    expected = pair.engine.generate(pair.prompts, sampling, keys)
    assert len({len(c.token_ids) for group in expected for c in group}) > 5
    (pid,), taken = pair.engine.pids, []
    lines = Worker.lines

    def watched(self: Worker, path: str, body: bytes, timeout: float) -> Iterator[dict[str, Any]]:
        for line in lines(self, path, body, timeout):
            if path == "/generate":
                taken.append((tuple(line["tokens"]), tuple(line["logprobs"])))
            yield line
            if len(taken) == 3 and pid in pair.engine.pids:
                os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(Worker, "lines", watched)
    answers = pair.engine.generate(pair.prompts, sampling, keys)
    assert pair.engine.pids not in ([pid], [None])
    assert 3 <= len(taken) == 24  # what came before the kill was not asked for again
    assert sorted(taken) == sorted((c.token_ids, c.logprobs) for group in answers for c in group)
    assert tokens(answers) == tokens(expected)
    assert distance(answers, [[np.asarray(c.logprobs) for c in group] for group in expected]) < ATOL


@pytest.fixture(scope="module")
def model() -> tuple[ModelConfig, Processor, dict[str, Any]]:
    processor = make_processor()
    config = make_config(processor, moe=False)
    return config, processor, make_params(config, 0)


class Stub:
    """A server that speaks as a worker does, without a model: the answer to a sample is its seed.

    Attributes:
      silent_after: answers of a call after which it hangs, or breaks off where `breaks`; None answers all.
      asked: the seeds that it was asked for, call by call.
      files: what it was sent.
    """

    def __init__(self, silent_after: int | None = None, *, breaks: bool = False) -> None:
        self.version, self.asked, self.files = "", [], set()
        stub, self._end = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def reply(self, *lines: Any) -> None:
                self.send_response(200)
                self.end_headers()
                for line in lines:
                    self.wfile.write(json.dumps(line).encode() + b"\n")

            def do_GET(self) -> None:
                self.reply({"state": "ready", "version": stub.version})

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                stub.files.add(self.path.removeprefix("/weights/"))
                self.reply({})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/update":
                    order = json.loads(body)
                    stub.version = order["version"] if stub.files == set(order["files"]) else "incomplete"
                    self.reply({"version": stub.version}, {"done": True})
                    return
                seeds = [seed for _, seed in unpack(body)[0]["samples"]]
                stub.asked.append(seeds)
                rest = {"logprobs": [0.0], "reason": "stop", "version": stub.version}
                self.reply(*({"sample": i, "tokens": [seed], **rest} for i, seed in enumerate(seeds[:silent_after])))
                if silent_after is None:
                    self.wfile.write(b'{"done": true}\n')
                elif not breaks:
                    self.wfile.flush()
                    stub._end.wait(600)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.parametrize("breaks", [True, False])
def test_another_server_takes_over_what_a_lost_one_had_not_answered(model: Any, breaks: bool) -> None:
    sampling, keys = SamplingConfig(num_samples=4), sampling_keys(0, 0, [0, 1], 4)
    prompts = make_prompts(model[1])[:2]
    with contextlib.closing(Stub(1, breaks=breaks)) as bad, contextlib.closing(Stub()) as good:
        engine = VLLMEngine(*model, urls=[bad.url, good.url], token="x", timeout=1.0)
        with contextlib.closing(engine):
            answers = engine.generate(prompts, sampling, keys)
            assert answers == engine.generate(prompts, sampling, keys)  # of the good one alone
            assert len(bad.asked) == 1
            engine.update(model[2], 1)
            engine.generate(prompts, sampling, keys)
    seeds = seeds_of(keys)
    assert [[c.token_ids for c in group] for group in answers] == [[(int(seed),) for seed in row] for row in seeds]
    # Two halves, and what one lacked; then everything; then the lost one is tried again.
    assert [len(asked) for asked in good.asked] == [4, 3, 8, 4, 3]
    assert set(good.asked[0] + good.asked[1]) == set(seeds.ravel().tolist()) - set(bad.asked[0][:1])
    assert len(bad.asked) == 2


def test_servers_that_are_all_lost_are_an_error(model: Any) -> None:
    prompt = make_prompts(model[1])[0]
    with contextlib.closing(Stub(0, breaks=True)) as bad:
        engine = VLLMEngine(*model, urls=[bad.url], token="x", max_losses=2)
        with contextlib.closing(engine), pytest.raises(RuntimeError, match="failed 2 times in a row"):
            engine.generate([prompt], SamplingConfig(), sampling_keys(0, 0, [0], 1))
    assert len(bad.asked) == 2


def test_circles_are_those_of_the_definition() -> None:
    rng, found = np.random.default_rng(0), 0
    for _ in range(400):
        answer = rng.integers(0, rng.integers(2, 4), rng.integers(1, 16)).tolist()
        window, count, length = (int(rng.integers(low, high)) for low, high in ((1, 6), (2, 4), (0, 12)))
        expected = any(
            size >= max(period * count, length) and size <= len(answer)
            and all(a == b for a, b in zip(answer[-size:], answer[-size + period :], strict=False))
            for period in range(1, window + 1)
            for size in range(period + 1, len(answer) + 1)
        )  # fmt: skip
        assert goes_round(answer, window, count, length) == expected
        found += expected
    assert 20 < found < 380


def test_a_worker_without_its_secret_answers_nobody(pairs: dict[str, Pair]) -> None:
    (worker,) = pairs["moe"].engine._workers
    worker.ready(600, threading.Event())
    stranger = Worker("stranger", "guess", port=worker.port)
    with pytest.raises(ValueError, match="another secret"):
        stranger.request("GET", "/health", None, 10)
    with pytest.raises(ValueError, match="another secret"):
        stranger.request("POST", "/close", b"{}", 10)
    assert worker.request("GET", "/health", None, 10)["state"] == "ready"


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def test_no_process_outlives_a_trainer_that_is_killed() -> None:
    trainer = subprocess.Popen([sys.executable, str(PROGRAM)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    with trainer, trainer.stdout:
        pid, *folders = trainer.stdout.readline().split()
        assert alive(int(pid)) and all(Path(folder).is_dir() for folder in folders)
        trainer.kill()
    end = time.monotonic() + 60
    while time.monotonic() < end and (alive(int(pid)) or any(Path(folder).exists() for folder in folders)):
        time.sleep(0.1)
    assert not alive(int(pid))
    assert not any(Path(folder).exists() for folder in folders)


def test_close_ends_processes_and_removes_folders(model: Any) -> None:
    engine = make_engine(*model, workers=2)
    pids, folders = engine.pids, list(engine._removed)
    assert len(set(pids)) == 2 and all(alive(pid) for pid in pids if pid)
    engine.close()
    engine.close()
    assert not any(alive(pid) for pid in pids if pid)
    assert not any(folder.exists() for folder in folders)
    with pytest.raises(ValueError, match="closed"):
        engine.update(model[2], 1)


def test_a_worker_that_keeps_dying_is_an_error_with_its_last_output(model: Any) -> None:
    engine = VLLMEngine(*model, environments=[{"PYTHONHOME": "/nowhere"}], max_losses=2)
    with contextlib.closing(engine), pytest.raises(RuntimeError, match=r"(?s)failed 2 times in a row.*Python"):
        engine.generate([make_prompts(model[1])[0]], SamplingConfig(), sampling_keys(0, 0, [0], 1))


def test_mistakes_are_named_before_anything_is_asked(model: Any) -> None:
    config, processor, params = model
    prompt = make_prompts(processor)[0]
    with pytest.raises(ValueError, match="full, int8 or fp8"):
        VLLMEngine(config, processor, params, weights="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers must be at least 1"):
        VLLMEngine(config, processor, params, workers=0)
    with pytest.raises(ValueError, match="secret"):
        VLLMEngine(config, processor, params, urls=["http://127.0.0.1:1"])
    with pytest.raises(ValueError, match="http://host:port"):
        VLLMEngine(config, processor, params, urls=["127.0.0.1:1"], token="x")
    engine = VLLMEngine(config, processor, params, urls=["http://127.0.0.1:1"], token="x", max_length=64)
    with contextlib.closing(engine):
        with pytest.raises(ValueError, match="one per prompt and sample"):
            engine.generate([prompt], SamplingConfig(), sampling_keys(0, 0, [0], 2))
        with pytest.raises(ValueError, match="raise max_length"):
            engine.generate([prompt], SamplingConfig(max_new_tokens=64), sampling_keys(0, 0, [0], 1))
        with pytest.raises(ValueError, match=r"missing text\.embed"):
            engine.update({**params, "text": {}}, 1)
