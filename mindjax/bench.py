"""`mindjax bench`: our speed and memory beside transformers on torch, same model, batch and machine, in one run.

Each side runs in a process of its own, so that its peak memory is its own. Both are warmed up, then they take turns,
one repetition each after one that is not timed, so that what else the machine does strikes both alike, and each finds
the caches as its own last step left them; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mindjax.allocator import keep_freed_memory
from mindjax.config import ModelConfig, TextConfig, VisionConfig

# Both sides: a step's large buffers are kept between steps and lie in huge pages. Else the kernel hands out, clears and
# takes back every page in every step: measured 20 % of ours at `tiny`, 5 to 15 % of torch's.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
COMMANDS = ("train", "sampler", "compile")
RESULT = "RESULT "
MIB = 2**20
# Of a loop over layers: keeping the products alone is faster than keeping all, for storing and reading the rest costs
# more than making it again. Without a loop there is nothing to gain by it.
REMAT = ("attention", "mlp_hidden")


def base_config() -> ModelConfig:
    """About 100 million parameters, half of them in the language model's layers."""
    return ModelConfig(
        text=TextConfig(16_384, 640, 2304, 12, 10, 5, 64, (12, 10, 10), rope_theta=10_000.0),
        vision=VisionConfig(8, 384, 1536, 6, 640, (1, 3, 5), num_position_embeddings=1024, patch_size=16),
        image_token_id=16_376,
        video_token_id=16_377,
        vision_start_token_id=16_373,
        vision_end_token_id=16_374,
        tie_word_embeddings=True,
    )


def model_config(name: str) -> ModelConfig:
    """A name of the catalog, or "100m"."""
    if name == "100m":
        return base_config()
    from mindjax.models.catalog import CATALOG

    if name not in CATALOG:
        raise ValueError(f"unknown model {name!r}; the models are 100m, {', '.join(CATALOG)}")
    return CATALOG[name]


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
      command: "train" or "sampler".
      model: see `model_config`.
      dtype: of the computation.
      rows: conversations in a batch, each with one image.
      text: text tokens of a row (of a prompt), beside the image's.
      grid: side of the image, in patches.
      new_tokens: generated per row by the sampler.
      threads: of each side; 0 takes all cores. With 1, seconds are of the processor and not of the wall clock, so
        that a busy machine matters little.
    """

    command: str
    model: str
    dtype: str
    rows: int = 16
    text: int = 90
    grid: int = 12
    new_tokens: int = 64
    threads: int = 0

    @property
    def name(self) -> str:
        return f"{self.command} {self.model} {self.dtype}"


def conversations(case: Case) -> list[Any]:
    """Random rows as `Rendered`: text, an image, text; all text after the image is a target."""
    from mindjax.data.packing import patch_coordinates
    from mindjax.data.render import Rendered

    config, rng = model_config(case.model), np.random.default_rng(0)
    merge, side = config.vision.spatial_merge_size, case.grid // config.vision.spatial_merge_size
    places, before = side * side, 6
    rows = []
    for _ in range(case.rows):
        # The catalog's control tokens come last in the vocabulary.
        words = rng.integers(0, config.text.vocab_size - 64, case.text - 2)
        tokens = [*words[:before], config.vision_start_token_id, *[config.image_token_id] * places]
        tokens += [config.vision_end_token_id, *words[before:]]
        first = before + 1
        modality = np.zeros(len(tokens), np.int8)
        modality[first : first + places] = 1
        mask = (np.arange(len(tokens)) > first + places).astype(np.float32)
        positions = np.repeat(np.arange(len(tokens))[:, None], 3, axis=1)
        positions[first : first + places] = first + np.stack(
            [np.zeros(places, int), *(grid.reshape(-1) for grid in np.mgrid[:side, :side])], -1
        )
        positions[first + places :] -= places - side
        patches = rng.normal(size=(case.grid**2, config.vision.patch_dim)).astype(np.float32)
        assert len(patches) == len(patch_coordinates(case.grid, case.grid, merge))
        rows.append(Rendered(np.asarray(tokens, np.int32), mask, positions.astype(np.int32), modality,
                             ((patches, (case.grid, case.grid)),), int(positions.max()) + 1))  # fmt: skip
    return rows


def optimizer_config() -> Any:
    """The same AdamW on both sides."""
    from mindjax.train.optimizer import OptimizerConfig

    return OptimizerConfig(learning_rate=1e-4, weight_decay=0.01, schedule="constant")


# ---- our side


class OurTrainer:
    """The training step of `mindjax sft`."""

    def __init__(self, case: Case):
        import jax

        from mindjax.data.packing import BatchShape, pack, size_of
        from mindjax.models import qwen3_vl
        from mindjax.ops.scan import loops
        from mindjax.sft.train import SFTLoss
        from mindjax.train.state import TrainState
        from mindjax.train.step import train_step

        config, rows, optimizer = model_config(case.model), conversations(case), optimizer_config()
        length, frame = len(rows[0].tokens), case.grid**2
        shape = BatchShape.for_sizes([size_of(row) for row in rows], case.rows, config.vision, length=length)
        shape = replace(shape, vision_rows=case.rows, vision_length=frame)
        batch = pack([[row] for row in rows], shape)
        self._batches = jax.tree.map(lambda x: x[None], batch)
        remat = REMAT if loops(config.text.num_hidden_layers, False) else "none"
        self._step = train_step(SFTLoss(config, "token", remat), optimizer, case.dtype)
        key = jax.random.key(0)
        self._state = TrainState.create(qwen3_vl.init(config, key), optimizer, key)

    def step(self) -> float:
        """One step; returns the loss before it."""
        self._state, metrics = self._step(self._state, self._batches, 1e-4)
        total, count = metrics["loss"]
        return float(total) / float(count)


class OurSampler:
    """`mindjax.inference.sampler.generate`."""

    def __init__(self, case: Case):
        import jax
        import jax.numpy as jnp

        from mindjax.inference.sampler import SamplingConfig
        from mindjax.models import qwen3_vl

        self._config, self._prompts, self._calls = model_config(case.model), conversations(case), 0
        self._params = qwen3_vl.init(self._config, jax.random.key(0), jnp.dtype(case.dtype))
        self._sampling = SamplingConfig(max_new_tokens=case.new_tokens, ignore_eos=True)

    def step(self) -> int:
        """One call; returns how many tokens came out in all."""
        from mindjax.inference.sampler import generate, sampling_keys

        self._calls += 1
        keys = sampling_keys(0, self._calls, range(len(self._prompts)), 1)
        out = generate(self._params, self._config, self._prompts, sampling=self._sampling, keys=keys)
        return sum(len(completion.token_ids) for row in out for completion in row)


def make_runner(case: Case, side: str) -> tuple[Any, str]:
    """What to time, and the settings it runs with."""
    if side == "mindjax":
        return (OurTrainer if case.command == "train" else OurSampler)(case), "jit, donated state, float32 masters"
    import torch

    from mindjax.interop.torch_baseline import Sampler, Trainer, fastest

    torch.set_num_threads(case.threads or os.cpu_count() or 1)
    config, rows = model_config(case.model), conversations(case)
    settings: dict[str, Sequence[Any]] = {"attention": ("sdpa", "eager")}
    # batched_mm, the third, copies a matrix per token: measured 15 times slower at `tiny-moe`.
    settings["experts"] = ("eager", "grouped_mm") if config.text.num_experts else ("eager",)
    if case.command == "train":
        settings["masters"] = (False,) if case.dtype == "float32" else (False, True)
        trainer = partial(Trainer, config, rows, optimizer_config(), case.dtype)
        runner, chosen = fastest(trainer, settings)
        # Compiling takes up to a minute: only what is the fastest without.
        compiled: dict[str, Sequence[Any]] = {name: (value,) for name, value in chosen.items()}
        runner, chosen = fastest(trainer, compiled | {"compiled": (False, True)})
    else:
        runner, chosen = fastest(
            lambda **setting: Sampler(config, rows, case.dtype, new_tokens=case.new_tokens, **setting), settings
        )
    return runner, ", ".join(f"{name}={value}" for name, value in chosen.items())


# ---- processes


class CompileCounter:
    """Counts what XLA compiles in this process."""

    def __init__(self) -> None:
        import jax

        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def work(case: Case, side: str) -> None:
    """A worker's life: build, warm up, then one timed step per line on stdin, and its peak memory at the end."""
    if side == "mindjax":
        keep_freed_memory()  # as the commands do
    if case.threads and hasattr(os, "sched_setaffinity"):  # XLA takes a thread for each core that it may run on
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case.threads])
    counter = CompileCounter() if side == "mindjax" else None
    clock = time.process_time if case.threads == 1 else time.perf_counter
    runner, settings = make_runner(case, side)
    start = time.perf_counter()
    for _ in range(2):
        runner.step()
    compiled = counter.count if counter else 0
    answer({"settings": settings, "warm_up": time.perf_counter() - start})
    for _ in sys.stdin:
        runner.step()  # brings back what the other side's turn drove out of the caches, and put to sleep
        start = clock()
        value = runner.step()
        answer({"seconds": clock() - start, "value": value})
    answer({"peak": peak_memory(), "compiled": counter.count - compiled if counter else 0})


def answer(values: dict[str, Any]) -> None:
    """A worker's word to the process that started it."""
    print(RESULT + json.dumps(values), flush=True)


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Worker:
    """A side's process, which does one step per line on its stdin and answers on its stdout.

    Args:
      command: of the process.
      environment: beside this one's.
      quiet: keeps its stderr back unless it fails.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], *, quiet: bool = False):
        self._errors = tempfile.TemporaryFile("w+") if quiet else None  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | environment,
        )

    def read(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT))
        status, message = self._process.wait(), "see its message above"
        if self._errors:
            self._errors.seek(0)
            message = self._errors.read()[-4000:]
        raise RuntimeError(f"a benchmark process ended with status {status}; {message}")

    def step(self) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self.read()

    def finish(self) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.close()
        result = self.read()
        self._process.wait()
        return result

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def compare(case: Case, repetitions: int) -> dict[str, Any]:
    """Runs both sides in turns.

    Returns:
      per side tokens/s, peak bytes, settings; and `ratio`, ours over theirs.

    Raises:
      RuntimeError: where a side fails, or ours compiled anything after its warm-up.
    """
    rows = conversations(case)
    tokens = case.rows * case.new_tokens if case.command == "sampler" else sum(len(row.tokens) for row in rows)
    workers: dict[str, Worker] = {}
    result: dict[str, Any] = {"case": case}
    try:
        # One after the other: a warm-up beside a warm-up would choose settings by noise.
        for side in ("transformers", "mindjax"):
            command = [sys.executable, "-m", "mindjax.bench", "worker", json.dumps(asdict(case)), side]
            workers[side] = Worker(command, ALLOCATOR)
            result[side] = workers[side].read()
        seconds: dict[str, list[float]] = {side: [] for side in workers}
        for _ in range(repetitions):
            for side, worker in workers.items():
                seconds[side].append(worker.step()["seconds"])
        for side, worker in workers.items():
            median = statistics.median(seconds[side])
            result[side] |= worker.finish() | {"seconds": median, "tokens_per_second": tokens / median}
    finally:
        for worker in workers.values():
            worker.kill()
    if result["mindjax"]["compiled"]:
        raise RuntimeError(f"{case.name}: {result['mindjax']['compiled']} compilations after the warm-up")
    result["ratio"] = result["mindjax"]["tokens_per_second"] / result["transformers"]["tokens_per_second"]
    return result


def compile_seconds(layers: int) -> float:
    """Seconds to trace and compile a training step of the tiny model with that many layers."""
    import jax
    import jax.numpy as jnp

    from mindjax.data.packing import BatchShape, pack, size_of
    from mindjax.models import qwen3_vl
    from mindjax.sft.train import SFTLoss

    case = Case("train", "tiny", "float32", rows=4)
    config = model_config("tiny")
    config = replace(config, text=replace(config.text, num_hidden_layers=layers))
    rows = conversations(case)
    shape = BatchShape.for_sizes([size_of(row) for row in rows], case.rows, config.vision)
    batch = pack([[row] for row in rows], shape)
    loss = SFTLoss(config, "token", "none")
    step = jax.jit(jax.grad(lambda params, batch: loss(params, batch)[0].sum))
    start = time.perf_counter()
    step.lower(qwen3_vl.abstract_params(config, jnp.float32), batch).compile()
    return time.perf_counter() - start


# ---- tables


def _table(results: list[dict[str, Any]]) -> str:
    lines = [
        f"{'case':34}{'rows':>5}{'mindjax':>12}{'torch':>12}{'ratio':>8}{'mindjax':>10}{'torch':>10}  torch settings",
        f"{'':34}{'':>5}{'tokens/s':>12}{'tokens/s':>12}{'':>8}{'MiB':>10}{'MiB':>10}",
    ]
    for result in results:
        ours, theirs = result["mindjax"], result["transformers"]
        lines.append(
            f"{result['case'].name:34}{result['case'].rows:>5}{ours['tokens_per_second']:>12,.0f}"
            f"{theirs['tokens_per_second']:>12,.0f}{result['ratio']:>8.2f}{ours['peak'] / MIB:>10,.0f}"
            f"{theirs['peak'] / MIB:>10,.0f}  {theirs['settings']}"
        )
    return "\n".join(lines)


def cases(
    commands: Sequence[str], models: Sequence[str], dtypes: Sequence[str], rows: int, threads: int = 0
) -> list[Case]:
    """All combinations; the largest model trains on fewer, longer rows."""
    result = []
    for command in commands:
        for model in models:
            for dtype in dtypes:
                case = Case(command, model, dtype, rows, threads=threads)
                if model == "100m" and command == "train":
                    case = replace(case, rows=max(1, rows // 4), text=220)
                result.append(case)
    return result


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mindjax bench", description=__doc__)
    commands = f"of {', '.join(COMMANDS)}; all by default; or grouped_matmul or rl alone, with options of their own"
    parser.add_argument("commands", nargs="*", help=commands)
    parser.add_argument("--models", default="tiny,tiny-moe,100m", help="of the catalog, or 100m (default: %(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=16, help="conversations per batch (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=9, help="timed steps of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of each side; 0 is all cores, 1 times the processor")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.commands) - set(COMMANDS))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(COMMANDS)}")
    return arguments


def main(argv: Sequence[str]) -> None:
    """Runs the benchmarks named on the command line and prints one table."""
    if argv[:1] == ["grouped_matmul"]:
        from mindjax import bench_grouped_matmul

        return bench_grouped_matmul.main(argv[1:])
    if argv[:1] == ["rl"]:
        from mindjax import bench_rl

        return bench_rl.main(argv[1:])
    arguments = parse(argv)
    commands = arguments.commands or list(COMMANDS)
    compared = cases(
        [c for c in COMMANDS if c in commands and c != "compile"],
        arguments.models.split(","),
        arguments.dtypes.split(","),
        arguments.rows,
        arguments.threads,
    )
    results = []
    for case in compared:
        print(f"measuring {case.name} ...", file=sys.stderr, flush=True)
        results.append(compare(case, arguments.repetitions))
    if results:
        print(_table(results))
        print("medians of interleaved repetitions; peak memory of each process; no compilation after our warm-up")
    if "compile" in commands:
        compile_seconds(4)  # what only the first compilation pays: imports, threads
        few, many = compile_seconds(12), compile_seconds(48)
        print(f"compile a training step: 12 layers {few:.1f} s, 48 layers {many:.1f} s, ratio {many / few:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(Case(**json.loads(sys.argv[2])), sys.argv[3])
    else:
        main(sys.argv[1:])
