"""`mindjax bench rl`: a whole RL step beside Tunix's, and a rollout beside transformers' and vLLM's, in one run each.

As in `mindjax bench`: each side runs in a process of its own, is warmed up, and then they take turns; medians are
reported. Tunix is installed on first use into an environment of its own, `.cache/tunix`, for it wants other versions
of what we use.

The step: 4 prompts x 4 samples, 64 + 64 tokens, 4 layers x 256, the same parity reward. Both sides sample to full
length, score, and make one GSPO update with AdamW. It is on policy: its own log-probabilities are the old ones on both
sides. Beside it, ours alone: with two updates, which need old log-probabilities of their own, and with pictures. Bar:
at most half of Tunix's time.

The rollout: 4 pictures x 8 samples of a model of about 260 million parameters; answers of 8 to 64 tokens, each as long
on one side as on the other. The model is random and stops nowhere by itself, so lengths are given: vLLM and our sampler
take a limit per answer; transformers goes on to the longest answer of the batch, for nothing that it offers ends one
earlier, and only the tokens that were asked for count. vLLM shares the prompt and the picture between samples
(prefix and encoder caches), and forgets them between repetitions as it must when weights change. Bars: at least 5
times transformers, at most 1.2 times vLLM's time. Ours runs a second time with int8 weights, as rollouts may that the
trainer corrects; the bars are for the first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mindjax.bench import ALLOCATOR, MIB, Worker
from mindjax.bench_rl_sides import (
    SHARES,
    WARM_UP,
    RolloutCase,
    StepCase,
    picture_side,
    prompts,
    rollout_model,
    step_model,
    write_model,
)

TUNIX = ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8")
SIDES = {"step": ("mindjax", "tunix"), "rollout": ("mindjax", "transformers", "vllm")}
SIZES = ("full", "tiny")
# Ours beside itself.
ALONE: dict[str, dict[str, Any]] = {"two updates": {"updates": 2}, "pictures": {"pictures": True}}
INT8 = "mindjax, int8 weights"
# Ratios of seconds, ours over theirs, at most.
BARS = {"tunix": 0.5, "transformers": 1 / 5, "vllm": 1.2}


def tunix_step(case: StepCase) -> list[str]:
    """The command of Tunix's side; its environment is made where it is missing."""
    text = step_model(case.size).text
    fields = {
        "num_layers": text.num_hidden_layers, "vocab_size": text.vocab_size, "embed_dim": text.hidden_size,
        "hidden_dim": text.intermediate_size, "num_heads": text.num_attention_heads, "head_dim": text.head_dim,
        "num_kv_heads": text.num_key_value_heads, "rope_theta": int(text.rope_theta),
        "norm_eps": text.rms_norm_eps, "use_tied_embedding": True,
    }  # fmt: skip
    spec = {**asdict(case), "model": fields, "warm_up": WARM_UP}
    script = Path(__file__).parent / "interop" / "tunix_baseline.py"
    return [str(tunix_python(Path(".cache") / "tunix")), str(script), json.dumps(spec)]


def tunix_python(folder: Path) -> Path:
    """The interpreter of an environment with Tunix in it, made by pip where it is missing or of another version."""
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    if not stamp.is_file() or json.loads(stamp.read_text()) != list(TUNIX):
        print(f"installing {TUNIX[0]} into {folder}: minutes, once", file=sys.stderr, flush=True)
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *TUNIX],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"Tunix cannot be installed; leave it out with --sides\n{done.stderr[-2000:]}")
        stamp.write_text(json.dumps(TUNIX))
    return python.absolute()


def work(case: RolloutCase) -> list[tuple[float, float]]:
    """(operations, bytes) that each step of the rollout cannot do without, the prompts' own step first.

    Operations: the vision encoder, the prompts once, and each answer's tokens alone: nobody need pay for finished rows.
    Bytes: the weights of the language model once a step, and the keys and values of every unfinished row.
    """
    from mindjax.evaluation.compute import Compute

    model, text = rollout_model(case.size), rollout_model(case.size).text
    compute, width = Compute(model), 4 if case.dtype == "float32" else 2
    prompt, lengths = len(prompts(case)[0].tokens), case.lengths.reshape(-1)
    head = 2 * text.vocab_size * text.hidden_size
    weights = width * compute.text(1, 1, 0) / 2  # a token alone: two operations per weight
    kv = width * text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim
    prefill = compute.text(case.pictures, prompt, prompt) - case.pictures * (prompt - 1) * head
    prefill += compute.vision(case.pictures, (picture_side(model) // model.vision.patch_size) ** 2)
    steps = [(prefill, weights)]
    for step in range(1, int(lengths.max())):
        rows = int((lengths > step).sum())
        steps.append((compute.text(rows, 1, prompt + step), weights + rows * (prompt + step) * kv))
    return steps


def floor(case: RolloutCase) -> dict[str, float]:
    """`work` in all, and, where torch is there to measure the machine, the seconds that it takes: of every step the
    larger of operations over torch's dense product, and bytes over what all threads read from memory."""
    steps = work(case)
    result = {"operations": sum(flops for flops, _ in steps), "bytes": sum(size for _, size in steps)}
    if importlib.util.find_spec("torch"):
        speed, memory = machine(case.dtype)
        result |= {"operations_per_second": speed, "bytes_per_second": memory}
        result["seconds"] = sum(max(flops / speed, size / memory) for flops, size in steps)
    return result


def machine(dtype: str) -> tuple[float, float]:
    """(operations per second of torch's dense product, bytes per second read from memory)."""
    import torch

    from mindjax.bench_grouped_matmul import bandwidth, seconds_of

    memory = bandwidth(len(os.sched_getaffinity(0)), 3)
    a = torch.ones(1024, 1024, dtype=getattr(torch, dtype))
    seconds = min(seconds_of({"product": lambda: torch.mm(a, a)}, 5)["product"] for _ in range(3))
    return 2 * 1024**3 / seconds, memory


# ---- all together


def in_turns(commands: dict[str, tuple[list[str], dict[str, str]]], repetitions: int) -> dict[str, dict[str, Any]]:
    """Runs the sides (command, environment) as `mindjax.bench.compare` does.

    Returns:
      per side: median seconds, processor seconds over all threads, and what it said of itself.
    """
    workers: dict[str, Worker] = {}
    result: dict[str, dict[str, Any]] = {}
    try:
        for side, (command, environment) in commands.items():
            print(f"warming up {side} ...", file=sys.stderr, flush=True)
            workers[side] = Worker(command, environment, quiet=True)
            result[side] = workers[side].read()
        taken: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
        for _ in range(repetitions):
            for side, worker in workers.items():
                taken[side].append(worker.step())
        for side, worker in workers.items():
            result[side] |= worker.finish()
            for key in taken[side][0]:
                result[side][key] = statistics.median(turn[key] for turn in taken[side])
    finally:
        for worker in workers.values():
            worker.kill()
    for side, values in result.items():
        if values.get("compiled"):
            raise RuntimeError(f"{side}: {values['compiled']} compilations after the warm-up")
    return result


def _worker(side: str, case: StepCase | RolloutCase, *more: str) -> tuple[list[str], dict[str, str]]:
    environment = dict(ALLOCATOR)
    if side == "vllm":
        from mindjax.interop.vllm import ENVIRONMENT

        environment |= ENVIRONMENT
    return [sys.executable, "-m", "mindjax.bench_rl_sides", side, json.dumps(asdict(case)), *more], environment


def measure_step(case: StepCase, sides: Sequence[str]) -> dict[str, Any]:
    """The step beside Tunix's, and ours alone with two updates and with pictures."""
    commands = {"mindjax": _worker("step", case)}
    if "tunix" in sides:
        commands["tunix"] = (tunix_step(case), dict(ALLOCATOR))
    result = in_turns(commands, case.repetitions)
    for name, changed in ALONE.items():
        alone = in_turns({"mindjax": _worker("step", replace(case, **changed))}, case.repetitions)
        result[f"mindjax, {name}"] = alone["mindjax"]
    return {"case": asdict(case), "sides": result, "ratios": ratios(result)}


def measure_rollout(case: RolloutCase, sides: Sequence[str], repetitions: int) -> dict[str, Any]:
    """The rollout on each side."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(case, Path(folder))
        wanted = [side for side in SIDES["rollout"] if side in sides]
        # Ours warms up last: the others' choices of settings are then made on a machine without it.
        commands = {side: _worker(side, case, folder) for side in sorted(wanted, key="mindjax".__eq__)}
        commands[INT8] = _worker("mindjax", replace(case, weights="int8"), folder)
        result = in_turns(commands, repetitions)
    for values in result.values():
        values["tokens_per_second"] = int(case.lengths.sum()) / values["seconds"]
    described = asdict(case) | {"lengths": case.lengths.tolist()}
    return {"case": described, "sides": result, "ratios": ratios(result), "int8_ratios": ratios(result, INT8),
            "floor": floor(case)}  # fmt: skip


def ratios(sides: dict[str, dict[str, Any]], ours: str = "mindjax") -> dict[str, float]:
    """Our seconds over those of every other side."""
    seconds = sides[ours]["seconds"]
    return {side: seconds / sides[side]["seconds"] for side in BARS if side in sides}


def missed(result: dict[str, Any]) -> list[str]:
    """The bars that a result does not reach, in words."""
    return [
        f"{what}: {ratio:.2f} of {side}'s time, more than {BARS[side]:.2f}"
        for what in SIDES
        for side, ratio in result.get(what, {}).get("ratios", {}).items()
        if ratio > BARS[side]
    ]


def table(result: dict[str, Any]) -> str:
    """What is printed without --json."""
    lines = []
    if "step" in result:
        case, step = result["step"]["case"], result["step"]
        lines.append(f"RL step: {case['prompts']} prompts x {case['samples']} samples, {case['prompt_tokens']} + "
                     f"{case['new_tokens']} tokens, float32; seconds")  # fmt: skip
        lines.append(f"{'':24}{'step':>9}{'processor':>11}{'ours / it':>11}" + "".join(f"{s:>10}" for s in SHARES))
        for side, values in step["sides"].items():
            lines.append(_row(side, values, step["ratios"]) + "".join(
                f"{values['shares'][s]:>10.3f}" if s in values.get("shares", {}) else f"{'-':>10}" for s in SHARES
            ))  # fmt: skip
    if "rollout" in result:
        case, rollout = result["rollout"]["case"], result["rollout"]
        lines.append(f"rollout: {case['pictures']} pictures x {case['samples']} samples, {case['shortest']} to "
                     f"{case['longest']} tokens, {case['dtype']}; seconds")  # fmt: skip
        lines.append(f"{'':24}{'rollout':>9}{'processor':>11}{'ours / it':>11}{'tokens/s':>10}{'MiB':>8}  settings")
        for side, values in rollout["sides"].items():
            lines.append(f"{_row(side, values, rollout['ratios'])}{values['tokens_per_second']:>10.1f}"
                         f"{values['peak'] / MIB:>8,.0f}  {values['settings']}")  # fmt: skip
        others = (f"{ratio:.2f} of {side}'s time" for side, ratio in rollout["int8_ratios"].items())
        lines.append(f"with int8 weights: {', '.join(others) or 'nothing to compare with'}")
        least = rollout["floor"]
        lines.append(f"floor: {least['operations'] / 1e9:,.1f} GFLOP, {least['bytes'] / 1e9:,.2f} GB" + (
            f"; at {least['operations_per_second'] / 1e9:,.0f} GFLOP/s and {least['bytes_per_second'] / 1e9:,.1f} GB/s "
            f"{least['seconds']:.2f} s" if "seconds" in least else ""
        ))  # fmt: skip
    return "\n".join([*lines, *(f"missed: {miss}" for miss in result["missed"])])


def _row(side: str, values: dict[str, Any], ratios: dict[str, float]) -> str:
    ratio = f"{ratios[side]:.2f}" if side in ratios else "-"
    return f"{side:24}{values['seconds']:>9.3f}{values['cpu_seconds']:>11.3f}{ratio:>11}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mindjax bench rl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted({side for sides in SIDES.values() for side in sides})
    parser.add_argument("parts", nargs="*", help="of step, rollout; both by default")
    parser.add_argument("--sides", default=",".join(names), help="default: %(default)s; mindjax is always there")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny is for a look at the output alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the rollout")
    parser.add_argument("--repetitions", type=int, default=7, help="timed turns of each side (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    arguments.sides = [side for side in arguments.sides.split(",") if side]
    for given, known, kind in ((arguments.parts, SIDES, "part"), (arguments.sides, names, "side")):
        unknown = sorted(set(given) - set(known))
        if unknown:
            parser.error(f"unknown {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    if arguments.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, not {arguments.repetitions}")
    return arguments


def main(argv: Sequence[str]) -> None:
    """Measures and prints; exits with 1 where a bar is missed."""
    arguments = parse(argv)
    parts = arguments.parts or list(SIDES)
    result: dict[str, Any] = {}
    if "step" in parts:
        step = StepCase(arguments.size, repetitions=arguments.repetitions)
        if arguments.size == "tiny":
            step = replace(step, prompts=2, samples=2, prompt_tokens=24, new_tokens=8)
        result["step"] = measure_step(step, arguments.sides)
    if "rollout" in parts:
        rollout = RolloutCase(arguments.size, dtype=arguments.dtype)
        if arguments.size == "tiny":
            rollout = replace(rollout, pictures=2, samples=2, text=24, longest=12)
        result["rollout"] = measure_rollout(rollout, arguments.sides, arguments.repetitions)
    result["missed"] = missed(result)
    print(json.dumps(result, indent=1) if arguments.json else table(result))
    if result["missed"]:
        raise SystemExit(1)
