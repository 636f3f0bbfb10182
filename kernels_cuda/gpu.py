"""Everything that a GPU machine can tell about the kernels, in one command: `python -m kernels_cuda.gpu [--out DIR]`.

Builds the CUDA library from source and checks its machine code, runs tests/gpu through both bindings, times the kernels
against the machine's ceilings and other implementations, and prints the table of bars. Needs a clone, nvcc, CMake, and
Python with jax, torch, numpy, ml_dtypes and pytest; nothing is downloaded. Each step has a time limit, so that a kernel
that hangs ends the step and not the machine's lease; `--only` runs some of the steps.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("build", "tests", "sanitizer", "benchmark")


def commands(out: Path) -> dict[str, tuple[list[str], int]]:
    """Step -> (command, limit in seconds)."""
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-q", "--maxfail=20", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    if find_spec("pytest_timeout"):  # names the test whose kernel hangs
        pytest += ["--timeout=60", "--timeout-method=thread"]
    return {
        "build": ([*python, "kernels_cuda.checks", "--json", str(out / "kernels.json")], 240),
        "tests": (pytest, 300),
        # Accesses outside the arrays, on the shapes with every kind of edge.
        "sanitizer": (["compute-sanitizer", "--error-exitcode=9", *pytest, "-k", "136-264 and edges and torch"], 240),
        "benchmark": ([*python, "kernels_cuda.benchmarks.gpu", "--json", str(out / "gpu.json")], 420),
    }


def environment() -> dict[str, str]:
    """JAX on the GPU, beside torch, and the library that this command builds."""
    return os.environ | {
        "JAX_PLATFORMS": "cuda,cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "MINDJAX_KERNELS": str(ROOT / "build" / "cuda"),
        "MINDJAX_REQUIRE_GPU": "1",  # a test that finds no GPU fails
        "PYTHONUNBUFFERED": "1",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the numbers and logs")
    parser.add_argument(
        "--only", nargs="+", choices=STEPS, default=["build", "tests", "benchmark"], help="steps to run"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for step in arguments.only:
        command, limit = commands(arguments.out)[step]
        if shutil.which(command[0]) is None:
            results[step] = f"no {command[0]}"
            continue
        print(f"== {step}: {' '.join(command)}", flush=True)
        results[step] = run(command, limit, arguments.out / f"{step}.log")
        if step == "build" and results[step] != "passed":
            break
    for step, result in results.items():
        print(f"{step}: {result}")
    return 0 if all(result == "passed" for result in results.values()) else 1


def run(command: list[str], limit: int, log: Path) -> str:
    """Runs a step, its output to the terminal and to `log`; "passed", or what became of it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.kill()

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        assert process.stdout is not None
        with log.open("w") as file:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
        code = process.wait()
    finally:
        timer.cancel()
    if stopped.is_set():
        return f"stopped after {limit} s"
    return "passed" if code == 0 else f"failed with exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
