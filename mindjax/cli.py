"""`mindjax COMMAND`: the command line, and the one place that wires what must not import each other.

Each command imports its own module when it is called, so that `mindjax --help` and `mindjax doctor` answer at once
and work in a broken environment.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import importlib
import json
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# What an experiment's `config.kind` runs: "module:function", called with (config, workdir), and for "rl" with what it
# must not import.
KINDS = {
    "pipeline": "mindjax.pipeline:run",
    "mgpo": "mindjax.mgpo:run",
    "sft": "mindjax.sft.train:main",
    "rl": "mindjax.rl.train:main",
    "dpo": "mindjax.dpo.train:main",
    "eval": "mindjax.evaluation.run:main",
    "results": "mindjax.results:run",
}
EXPERIMENT_HELP = {
    "run": "run an experiment file, whatever its kind",
    "sft": "supervised fine-tuning",
    "rl": "reinforcement learning with GSPO",
    "dpo": "preference optimisation",
    "eval": "accuracy of a checkpoint on benchmarks",
    "results": "what each part of the RL stage does, in runs that differ in it alone",
}
ONE_PROCESS = ("eval", "results")  # the kinds that would do the same work in every process
# Where a missing module is found: the extra of this distribution that brings it.
EXTRA_OF_MODULE = {
    "sklearn": "quickstart",
    "skimage": "quickstart",
    "matplotlib": "quickstart",
    "torch": "parity",
    "vllm": "vllm",
    "nbclient": "notebooks",
    "nbformat": "notebooks",
    "pytest": "dev",
}

Command = Callable[[argparse.Namespace, list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 2 for a mistake of the user, 130 for Ctrl-C."""
    if argv is None:
        _with_huge_pages()
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would warn that torch is not there
    if "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("PJRT_NPROC", "32")  # threads: a collective blocks one for each device
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    try:
        return _leave(arguments.function(arguments, rest))
    except KeyboardInterrupt:
        again = " ".join(shlex.quote(argument) for argument in ["mindjax", *argv])
        goes_on = " it goes on from its last checkpoint with" if arguments.command in EXPERIMENT_HELP else " again with"
        print(f"\ninterrupted;{goes_on}\n  {again}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        extra = EXTRA_OF_MODULE.get((error.name or "").partition(".")[0])
        if extra is None or arguments.traceback:
            raise
        print(f"mindjax: {error}; it comes with  pip install 'mindjax[{extra}]'", file=sys.stderr)
    except (ValueError, FileNotFoundError) as error:
        if arguments.traceback:
            traceback.print_exc()
        else:
            print(f"mindjax: {error}\n(--traceback shows where)", file=sys.stderr)
    return _leave(2)


def _with_huge_pages(setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> None:
    """Starts this process again with huge pages in malloc, where Linux gives them to those who ask.

    They spare a training step 3 % of its time on a CPU and the sampler 5 %, beside freed memory that is kept.
    """
    asked = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in asked or not setting.exists() or "[madvise]" not in setting.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [asked, "glibc.malloc.hugetlb=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _leave(status: int) -> int:
    """See `sharding.processes.leave`; where that is not loaded there is one process, and jax may not be installed."""
    processes = sys.modules.get("sharding.processes")
    return processes.leave(status) if processes else status


def build_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    parser = argparse.ArgumentParser(
        prog="mindjax", description="Post-training of vision-language models in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mindjax {metadata.version('mindjax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: Command, help: str, **options: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=help, description=help, parents=[common], allow_abbrev=False, **options
        )
        command.set_defaults(function=function)
        return command

    for name, help in EXPERIMENT_HELP.items():
        command = add(name, run_experiment, help)
        own = "experiments/results.py" if name == "results" else None
        command.add_argument(
            "--config", required=not own, default=own, metavar="FILE[:SIZE]", help="experiments/NAME.py[:debug]"
        )
        command.add_argument("--workdir", type=Path, help="default: runs/NAME[-SIZE]; an existing one is resumed")
        command.add_argument(
            "--change-config", action="store_true", help="resume a run although its config is no longer the same"
        )
        several = command.add_argument_group(
            "one of several processes", "found by itself in Slurm, Kubernetes, TPU slices and `mindjax launch`"
        )
        several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
        several.add_argument("--processes", type=int, metavar="N", help="how many there are")
        several.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
        command.epilog = "Any field of the config can be set: --config.optim.lr=1e-5"

    launch = add("launch", run_launch, "run a command as several processes on this machine, on CPU devices")
    launch.add_argument("--processes", type=int, required=True, metavar="N")
    launch.add_argument(
        "--devices-per-process", type=int, default=1, metavar="D", help="virtual CPU devices; default 1"
    )
    launch.add_argument(
        "--timeout", type=int, default=30, metavar="S", help="until a dead or stopped process ends the job; default 30"
    )
    launch.add_argument(
        "--step-timeout",
        type=int,
        default=0,
        metavar="S",
        help="until a step that does not finish ends it; default: none",
    )
    launch.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="such as  mindjax sft --config=..."
    )

    generate = add("generate", run_generate, "answer a conversation with images")
    generate.add_argument("model_dir", metavar="MODEL_DIR", help="a Hugging Face folder")
    generate.add_argument("--messages", required=True, type=Path, help="a JSON file in the HF chat format")
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    generate.add_argument("--ignore-eos", action="store_true", help="always generate --max-new-tokens tokens")
    generate.add_argument("--json", action="store_true", help="print one JSON line with tokens and log-probs")

    convert = add("convert", run_convert, "rewrite a checkpoint in another dtype or expert layout")
    convert.add_argument("source", metavar="SRC", help="a Hugging Face folder")
    convert.add_argument("destination", metavar="DST", help="the folder to write")
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "fp8-block"),
        help="default: as it is, bfloat16 where SRC is in fp8 blocks",
    )
    convert.add_argument(
        "--layout",
        choices=("published", "transformers"),
        default="published",
        help="how experts are written: as in the published files (and for vLLM), or as transformers saves them",
    )

    convert.add_argument(
        "--source-layout", choices=("published", "transformers"), help="of SRC, where shapes cannot tell the two apart"
    )

    add("bench", run_bench, "speed and memory beside the alternatives", add_help=False)  # it has options of its own
    parity = add("parity", run_parity, "how far the model is from transformers and vLLM, layer by layer")
    parity.add_argument("model_dir", nargs="?", default="random", metavar="MODEL_DIR", help="default: random, small")
    parity.add_argument("--against", action="append", choices=("torch", "vllm"), help="default: torch; repeat for both")
    parity.add_argument("--backend", choices=("cpu", "cuda"), default="cpu", help="where both sides run")
    parity.add_argument("--model", action="append", choices=("dense", "moe"), help="which random one; default: both")
    parity.add_argument(
        "--dtype", action="append", choices=("float32", "bfloat16", "int8", "fp8"), help="default: all; repeat for some"
    )
    parity.add_argument("--json", action="store_true", help="the result as one JSON line, the last one")
    parity.add_argument("--output", type=Path, metavar="DIR", help="write parity.json, parity.txt and heat maps there")
    parity.epilog = "Exit status 1 where an error is past its bound."
    plan = add("plan", run_plan, "memory, exchanges and time of a training step on devices that are not here")
    plan.add_argument("--model", required=True, help="a model folder, or a name such as qwen3-vl-30b-a3b")
    plan.add_argument("--topology", required=True, help="v5p:4x4x4, v6e:16x16, v5e:4x4 (chips), h100:64, h200:8, cpu:8")
    plan.add_argument("--batch", type=int, required=True, help="rows of an update, over all devices")
    plan.add_argument("--length", type=int, required=True, help="tokens of a row")
    plan.add_argument("--mesh", metavar="LAYOUT", help="fsdp=8,tensor=4; default: the fastest by the cost model")
    plan.add_argument("--images", type=int, default=1, help="in a row; default 1")
    plan.add_argument("--image-tokens", type=int, default=1024, help="of one; default 1024, a megapixel")
    plan.add_argument("--micro-batches", type=int, default=0, help="accumulated into an update; default: chosen")
    plan.add_argument("--remat", help="none, full, or names to keep: qkv,attention,mlp_hidden; default: chosen")
    plan.add_argument("--recompute", action="store_true", help="what each operator's recompute saves and costs")
    plan.add_argument("--search", action="store_true", help="compile the best few layouts, and write the winner")
    plan.add_argument("--candidates", type=int, default=3, help="layouts that --search compiles; default 3")
    plan.add_argument("--no-compile", action="store_true", help="the cost model alone; always so for GPUs")
    plan.add_argument("--output", type=Path, metavar="FILE.py", help="write an experiment for `mindjax sft --config=`")
    plan.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures")
    plan.add_argument("--json", action="store_true", help="the result as one JSON line, the last one")
    plan.epilog = "Exit status 1 where it does not fit."
    doctor = add("doctor", run_doctor, "what is installed, which devices, what is missing and how to get it")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    return parser


def run_experiment(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Loads the experiment, prepares its run directory and calls the main loop that its kind names."""
    from mindjax.allocator import keep_freed_memory
    from mindjax.experiment import load_experiment
    from sharding import processes

    keep_freed_memory()
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    _refuse([argument for argument in rest if argument not in overrides], ["--workdir", "--change-config", "--config"])
    config = load_experiment(arguments.config, overrides)
    kind = config.get("kind")
    if kind not in KINDS:
        raise ValueError(f"{arguments.config} sets kind {kind!r}; it can be {', '.join(KINDS)}")
    if arguments.command not in ("run", kind):
        raise ValueError(f"{arguments.config} is of kind {kind!r}: call `mindjax {kind}` or `mindjax run`")
    if processes.start(arguments.coordinator, arguments.processes, arguments.process_id) and kind in ONE_PROCESS:
        raise ValueError(
            f"{arguments.config} is of kind {kind!r}, which runs in one process: start it without the others"
        )
    name, _, size = arguments.config.partition(":")
    workdir = arguments.workdir or Path("runs") / "-".join(filter(None, [Path(name).stem, size]))
    prepare_workdir(workdir, config, change_config=arguments.change_config)
    module, function = KINDS[kind].split(":")
    options = {"engines": {"vllm": vllm_engine}, "load_classifier": load_classifier} if kind == "rl" else {}
    getattr(importlib.import_module(module), function)(config, workdir, **options)
    if kind == "rl" and processes.is_first():
        from mindjax.evaluation import rollouts

        print(f"what the policy said, and its curves: {rollouts.write(workdir)}")
    return 0


def vllm_engine(*arguments: Any) -> Any:
    """A `mindjax.rl.engine.RolloutEngine` over vLLM; imported when a run asks for it."""
    from mindjax.interop import vllm_rollout

    return vllm_rollout.make_engine(*arguments)


def load_classifier(folder: str) -> Any:
    """The classifier of a distance between answers; imported when a run asks for it."""
    from mindjax.interop import pair_classifier

    return pair_classifier.load(folder)


def prepare_workdir(workdir: Path, config: Any, *, change_config: bool) -> None:
    """Writes the exact command, versions and config into `workdir`; of several processes the first one writes.

    Raises:
      ValueError: the directory holds a run with another config, and `change_config` is off.
    """
    from mindjax.train.checkpoint import differences
    from sharding.processes import is_first

    path = workdir / "config.json"
    new = json.loads(config.to_json_best_effort())
    if path.exists() and not change_config:
        changes = differences(json.loads(path.read_text()), new)
        if changes:
            raise ValueError(
                f"{workdir} holds a run with another config ({'; '.join(changes[:5])}{' ...' * (len(changes) > 5)}); "
                f"choose another --workdir, remove that one, or resume it regardless with --change-config"
            )
    if not is_first():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(new, indent=2, sort_keys=True) + "\n")
    os.replace(draft, path)  # another process may be reading it
    with (workdir / "command.txt").open("a") as file:
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"{started}  {' '.join(shlex.quote(argument) for argument in ['mindjax', *sys.argv[1:]])}\n")
    (workdir / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")


def versions() -> dict[str, str]:
    """The versions that a result depends on: Python, the platform, and this distribution's core dependencies."""
    from mindjax.doctor import requirements

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for requirement in requirements():
        if not requirement.extra and requirement.installed:
            found[requirement.name] = requirement.installed
    return {**found, "mindjax": metadata.version("mindjax")}


def run_launch(arguments: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest, ["--processes", "--devices-per-process", "--timeout", "--step-timeout"])
    from mindjax import launch

    command = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
    return launch.main(
        command,
        arguments.processes,
        devices=arguments.devices_per_process,
        timeout=arguments.timeout,
        step_timeout=arguments.step_timeout,
    )


def run_generate(arguments: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest, ["--messages", "--max-new-tokens", "--temperature", "--seed", "--dtype", "--ignore-eos", "--json"])
    from mindjax.allocator import keep_freed_memory
    from mindjax.inference import generate

    keep_freed_memory()
    generate.main(arguments)
    return 0


def run_convert(arguments: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest, ["--dtype", "--layout", "--source-layout"])
    from mindjax.interop import fp8_blocks
    from mindjax.models import hf_weights

    to_blocks = arguments.dtype == "fp8-block"
    if to_blocks or fp8_blocks.is_block_fp8(arguments.source):
        if arguments.layout != "published":
            raise ValueError("fp8 blocks go with the published layout of experts; change that in a step of its own")
        if to_blocks:
            fp8_blocks.export(arguments.source, arguments.destination)
        else:
            fp8_blocks.restore(arguments.source, arguments.destination, dtype=arguments.dtype or "bfloat16")
        return 0
    hf_weights.convert(
        arguments.source,
        arguments.destination,
        dtype=arguments.dtype,
        layout=arguments.layout,
        source_layout=arguments.source_layout,
    )
    return 0


def run_bench(arguments: argparse.Namespace, rest: list[str]) -> int:
    from mindjax import bench

    bench.main(rest)
    return 0


def run_parity(arguments: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest, ["--against", "--backend", "--model", "--dtype", "--json", "--output"])
    from mindjax.interop import parity_report

    return parity_report.main(arguments)


def run_plan(arguments: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest, ["--model", "--topology", "--batch", "--length", "--mesh", "--images", "--image-tokens", "--html",
                   "--remat", "--micro-batches", "--recompute", "--search", "--candidates", "--no-compile",
                   "--output"])  # fmt: skip
    from mindjax.plan import plan

    return plan.main(arguments)


def run_doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    _refuse(rest, ["--json"])
    from mindjax import doctor

    report = doctor.examine()
    print(json.dumps(report.as_dict(), indent=2) if arguments.json else report.as_text())
    return 0 if report.healthy else 1


def _refuse(unknown: Sequence[str], known: Sequence[str]) -> None:
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; a field of the config is set with --config.KEY=VALUE"
        raise ValueError(f"unknown argument {unknown[0]!r}{hint}")


if __name__ == "__main__":
    sys.exit(main())
