"""The import order of docs and architecture, held for every file; and what `import mindjax` may cost."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("mindjax", "sharding", "kernels_cuda", "experiments")
BASE = {"mindjax", "mindjax.config", "mindjax.types", "sharding", "kernels_cuda"}
LIBRARY = BASE | {"mindjax.ops", "mindjax.models", "mindjax.data", "mindjax.losses"}
LOOP = LIBRARY | {"mindjax.inference", "mindjax.train", "mindjax.evaluation"}

# Unit -> the units it may import (itself always). Right may import left:
# sharding, kernels_cuda -> config, types -> ops -> models -> inference -> train -> sft, rl, dpo -> cli.
ALLOWED: dict[str, set[str]] = {
    "sharding": set(),
    "kernels_cuda": set(),
    "experiments": set(),
    "mindjax": set(),
    "mindjax.config": set(),
    "mindjax.types": set(),
    "mindjax.allocator": set(),
    "mindjax.ops": BASE,
    "mindjax.losses": {"mindjax.types", "mindjax.ops"},
    "mindjax.data": {"sharding", "mindjax.config", "mindjax.types"},
    "mindjax.models": BASE | {"mindjax.ops"},
    "mindjax.inference": LIBRARY - {"mindjax.losses"},
    "mindjax.train": LIBRARY | {"mindjax.inference"},
    "mindjax.evaluation": LIBRARY | {"mindjax.inference", "mindjax.train", "mindjax.experiment"},
    "mindjax.sft": LOOP | {"mindjax.experiment"},
    "mindjax.rl": LOOP | {"mindjax.experiment"},
    "mindjax.dpo": LOOP | {"mindjax.experiment"},
    "mindjax.interop": LIBRARY | {"mindjax.inference"},
    # What stands above the loops and below the command line.
    "mindjax.experiment": {"experiments"},
    "mindjax.doctor": {"mindjax", "kernels_cuda"},
    "mindjax.launch": {"sharding"},
    "mindjax.pipeline": LOOP | {"mindjax.experiment", "mindjax.sft", "mindjax.rl", "mindjax.dpo"},
    "mindjax.mgpo": LOOP | {"mindjax.experiment", "mindjax.sft", "mindjax.rl"},
    "mindjax.workers": {"mindjax.train"},
    "mindjax.results": LOOP
    | {"mindjax.allocator", "mindjax.experiment", "mindjax.workers", "mindjax.sft", "mindjax.rl", "mindjax.dpo"},
    "mindjax.plan": LOOP | {"mindjax.experiment", "mindjax.sft", "mindjax.rl", "mindjax.dpo"},
    # The command line, and the comparison with other systems that it starts.
    "mindjax.bench": {"*"},
    "mindjax.bench_grouped_matmul": {"*"},
    "mindjax.bench_rl": {"*"},
    "mindjax.bench_rl_sides": {"*"},
    "mindjax.cli": {"*"},
}
# Third parties that only some units may import, and where they may do so only inside a function.
ONLY_IN = {
    "torch": {"mindjax.interop", "kernels_cuda"},
    "torchvision": {"mindjax.interop"},
    "vllm": {"mindjax.interop"},
    "transformers": {"mindjax.interop", "mindjax.data"},
}
LAZY = ("transformers", "torch", "torchvision", "vllm")
# Modules that are bindings to torch and of no use without it.
TORCH_MODULES = ("kernels_cuda.torch_binding", "kernels_cuda.benchmarks.triton_gmm")
RAY_JOB = "experiments.cluster.ray_job"  # a program for machines with Ray
BARE = ("mindjax.ops", "kernels_cuda", "sharding")  # need jax (or torch) and numpy alone
BARE_MAY = {
    "mindjax.ops": {"jax", "numpy"},
    "kernels_cuda": {"jax", "numpy", "torch", "triton"},  # Triton in a benchmark alone
    "sharding": {"jax", "numpy"},
}


def unit_of(module: str) -> str:
    """mindjax.ops.matmul -> mindjax.ops; sharding.mesh -> sharding."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "mindjax" else parts[0]


def imports(tree: ast.Module) -> list[tuple[str, int, bool]]:
    """(module, line, whether at the top level) of every import; `if TYPE_CHECKING:` blocks do not count."""
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            # `from mindjax import bench` imports mindjax.bench.
            found.extend((f"{module}.{a.name}" if module in OURS else module, node.lineno, top) for a in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not inside)

    visit(tree, True)
    return found


def violations(module: str, source: str) -> list[str]:
    unit = unit_of(module)
    if unit not in ALLOWED:
        return [f"{module}: {unit} has no place in the import order; give it one in tests/test_imports.py"]
    allowed, problems = ALLOWED[unit], []
    for name, line, top in imports(ast.parse(source)):
        where, package = f"{module}:{line}", name.split(".")[0]
        if package in OURS:
            target = unit_of(name)
            if target not in ALLOWED:
                target = package  # a name of the package itself, as in `from mindjax import __version__`
            if target != unit and target not in allowed and "*" not in allowed:
                problems.append(f"{where}: {unit} may not import {target}")
        else:
            if package in ONLY_IN and unit not in ONLY_IN[package] and "*" not in allowed:
                problems.append(f"{where}: {unit} may not import {package}")
            if package in LAZY and top and unit != "mindjax.interop" and module not in TORCH_MODULES:
                problems.append(f"{where}: {package} is imported at the top level; import it where it is used")
            if unit in BARE and package not in BARE_MAY[unit] | sys.stdlib_module_names:
                problems.append(f"{where}: {unit} needs jax and numpy alone, not {package}")
    return problems


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_import_order() -> None:
    problems = [problem for module, path in modules() for problem in violations(module, path.read_text())]
    assert not problems, "\n".join(problems)


def test_every_folder_is_a_package() -> None:
    """A folder without __init__.py is left out of the distribution, and its tests still pass from a clone."""
    missing = {path.parent for _, path in modules() if not (path.parent / "__init__.py").is_file()}
    assert not missing


@pytest.mark.parametrize(
    ("module", "source", "names"),
    [
        ("mindjax.ops.x", "from mindjax.models import rope", "may not import mindjax.models"),
        ("mindjax.rl.x", "from mindjax.sft.train import main", "may not import mindjax.sft"),
        ("mindjax.sft.x", "from mindjax.interop import vllm", "may not import mindjax.interop"),
        ("mindjax.losses.x", "import mindjax.models.rope", "may not import mindjax.models"),
        ("mindjax.models.x", "def f():\n  from mindjax import cli", "may not import mindjax.cli"),
        ("sharding.x", "import mindjax.config", "may not import mindjax.config"),
        ("mindjax.models.x", "def f():\n  import torch", "may not import torch"),
        ("mindjax.data.x", "import transformers", "top level"),
        ("mindjax.ops.x", "import flax", "needs jax and numpy alone"),
        ("mindjax.new.x", "", "no place in the import order"),
    ],
)
def test_planted_violation_is_found(module: str, source: str, names: str) -> None:
    (problem,) = violations(module, source)
    assert names in problem


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mindjax.rl.x", "from mindjax.losses import gspo\nfrom mindjax.inference.sampler import generate"),
        ("mindjax.data.x", "def f():\n  import transformers"),
        ("mindjax.ops.x", "import functools\nimport jax.numpy as jnp\nfrom mindjax.ops.matmul import matmul"),
        ("mindjax.cli", "def f():\n  from mindjax.interop import vllm"),
    ],
)
def test_allowed_import_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_import_is_light() -> None:
    program = "import mindjax, sys; print(*(m for m in ('torch', 'vllm', 'transformers') if m in sys.modules))"
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
        assert result.stdout.split() == []
    assert statistics.median(seconds) < 1.5


def test_no_module_loads_torch_vllm_or_transformers_when_imported() -> None:
    """Every module below interop and bench, in one process: what is lazy stays lazy all the way down."""
    skipped = ("mindjax.interop", "mindjax.bench", RAY_JOB, *TORCH_MODULES)
    names = [name for name, _ in modules() if not name.startswith(skipped)]
    program = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "print(*(m for m in ('torch', 'vllm', 'transformers') if m in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
