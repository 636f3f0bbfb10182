"""`mindjax doctor`: what is installed, which devices there are, what is missing and how to get it."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Where a distribution's import name is not its own.
MODULE_OF = {"orbax-checkpoint": "orbax.checkpoint", "pillow": "PIL"}
USE_OF_EXTRA = {
    "quickstart": "the main job's digits, photographs and fonts",
    "parity": "the reference models that tests compare with",
    "vllm": "vLLM on a machine without a GPU",
    "vllm-cuda": "vLLM on an NVIDIA GPU",
    "cuda": "JAX on NVIDIA GPUs",
    "tpu": "JAX on TPUs",
    "plan": "compiling for TPUs that are not there, pictures of plans",
    "notebooks": "executing the notebooks",
    "dev": "tests, lint and types",
}


@dataclass(frozen=True)
class Requirement:
    """One requirement of this distribution.

    Attributes:
      name: of the distribution, as pip knows it.
      wanted: the version specifier, "" for any.
      extra: what brings it, "" for the core.
      installed: the version found, None without.
      problem: why it will not do, "" where it will.
    """

    name: str
    wanted: str
    extra: str
    installed: str | None
    problem: str


@dataclass(frozen=True)
class Report:
    """What `examine` found.

    Attributes:
      machine: Python, platform, cores and memory (GiB).
      requirements: core first, then by extra.
      devices: JAX's, one line each.
      notes: what is missing or wrong, each with the command that mends it.
      kernels: see `kernels_cuda.status`.
    """

    machine: dict[str, Any]
    requirements: tuple[Requirement, ...]
    devices: tuple[str, ...]
    notes: tuple[str, ...]
    kernels: dict[str, Any]

    @property
    def healthy(self) -> bool:
        """Whether every core dependency is there and imports."""
        core = [requirement for requirement in self.requirements if not requirement.extra]
        return bool(core) and not any(requirement.problem for requirement in core)

    def as_dict(self) -> dict[str, Any]:
        return {"healthy": self.healthy, **dataclasses.asdict(self)}

    def as_text(self) -> str:
        lines = [f"{key:<10} {value}" for key, value in self.machine.items()]
        lines += [f"{'device':<10} {device}" for device in self.devices or ("none",)]
        lines += [f"{'kernels':<10} {self.kernels['message']}"]
        extra = None
        for requirement in self.requirements:
            if requirement.extra != extra:
                extra = requirement.extra
                lines += ["", f"[{extra}] {USE_OF_EXTRA.get(extra, '')}".rstrip() if extra else "core"]
            mark = "x" if requirement.problem else "ok"
            state = requirement.problem or requirement.installed
            wanted = f"(wants {requirement.wanted})" if requirement.wanted else ""
            lines.append(f"  {mark:<3}{requirement.name:<18} {state}  {wanted}".rstrip())
        lines += ["", *self.notes]
        lines.append("the core is healthy" if self.healthy else "the core is broken")
        return "\n".join(lines)


def examine() -> Report:
    """Looks at the environment; importing the core for a check takes some seconds. Never raises for a broken one."""
    import kernels_cuda

    found = [_check_import(requirement) for requirement in requirements()]
    devices, device_problem = _devices()
    kernels = kernels_cuda.status()
    return Report(
        machine=_machine(),
        requirements=tuple(found),
        devices=devices,
        notes=tuple(_notes(found, device_problem, devices, kernels)),
        kernels=kernels,
    )


def requirements() -> list[Requirement]:
    """This distribution's requirements against what is installed, by version alone; nothing is imported."""
    from packaging.requirements import Requirement as Parsed

    try:
        declared = metadata.requires("mindjax") or []
    except metadata.PackageNotFoundError:
        return []
    extras = metadata.metadata("mindjax").get_all("Provides-Extra") or []
    found = []
    for parsed in map(Parsed, declared):
        needed_by = [
            extra for extra in ("", *extras) if parsed.marker is None or parsed.marker.evaluate({"extra": extra})
        ]
        if not needed_by:
            continue  # for another platform
        # `jax[cuda12]` is there when what its own extra brings is.
        for name, specifier in _brought_by(parsed) if parsed.extras else [(parsed.name, parsed.specifier)]:
            try:
                installed = metadata.version(name)
                problem = "" if specifier.contains(installed, prereleases=True) else f"{installed} does not fit"
            except metadata.PackageNotFoundError:
                installed, problem = None, "missing"
            found.append(Requirement(name, str(specifier), needed_by[0], installed, problem))
    order = ["", *USE_OF_EXTRA]
    return sorted(found, key=lambda each: order.index(each.extra) if each.extra in order else len(order))


def _brought_by(parsed: Any) -> list[tuple[str, Any]]:
    """(name, specifier) of what the extras of a requirement add to the distribution itself."""
    from packaging.requirements import Requirement as Parsed

    try:
        inner = [Parsed(text) for text in metadata.requires(parsed.name) or []]
    except metadata.PackageNotFoundError:
        return [(parsed.name, parsed.specifier)]
    added = [
        (each.name, each.specifier)
        for each in inner
        if each.marker and any(each.marker.evaluate({"extra": extra}) for extra in parsed.extras)
        if not each.marker.evaluate({"extra": ""})
    ]
    return added or [(parsed.name, parsed.specifier)]


def _check_import(requirement: Requirement) -> Requirement:
    """A core requirement that is installed and does not import is broken, whatever the reason."""
    if requirement.extra or not requirement.installed:
        return requirement
    module = MODULE_OF.get(requirement.name, requirement.name.replace("-", "_"))
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package can raise anything
        problem = f"{requirement.installed} does not import: {type(error).__name__}: {error}".splitlines()[0]
        return dataclasses.replace(requirement, problem=problem)
    return requirement


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own, where it has one
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text) / 2**30)
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cores": cores,
        "memory": f"{memory:.1f} GiB",
    }


def _devices() -> tuple[tuple[str, ...], str]:
    """JAX's devices as text, and what went wrong with them ("" for nothing)."""
    try:
        import jax

        return tuple(f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()), ""
    except Exception as error:  # no driver, a broken jaxlib, a platform that is not there
        return (), f"{type(error).__name__}: {error}".splitlines()[0]


def _notes(
    found: list[Requirement], device_problem: str, devices: tuple[str, ...], kernels: dict[str, Any]
) -> list[str]:
    if not found:
        return ["mindjax itself is not installed here: pip install -e ."]
    notes = []
    problems: dict[str, list[str]] = {}
    for requirement in found:
        if requirement.problem:
            problems.setdefault(requirement.extra, []).append(requirement.name)
    if "" in problems:
        notes.append(f"the core lacks {', '.join(problems[''])}: pip install --upgrade mindjax, or `make quickstart`")
    if device_problem:
        notes.append(f"JAX finds no device ({device_problem}); JAX_PLATFORMS=cpu works anywhere")
    gpu_used = any(not device.startswith("cpu") for device in devices)
    if kernels["gpus"] and not gpu_used:
        notes.append(f"{kernels['gpus'][0]} is not used by JAX: pip install 'mindjax[cuda]'")
    # One of the two vLLM builds is right for a machine; accelerators' extras are of no use without one.
    irrelevant = {"cuda", "vllm-cuda", "tpu"} if not kernels["gpus"] else {"vllm", "tpu"}
    for extra, names in problems.items():
        if extra and extra not in irrelevant:
            use = USE_OF_EXTRA.get(extra, extra)
            notes.append(f"{use} ({', '.join(names)} missing): pip install 'mindjax[{extra}]'")
    if _torchvision_needs_hook():
        notes.append("torchvision cannot be imported beside this torch: python -m mindjax.interop.torchvision_ops")
    return notes


def _torchvision_needs_hook() -> bool:
    """Whether a torchvision of another build than torch's is here without our start-up hook."""
    try:
        builds = {metadata.version(name).partition("+")[2] for name in ("torch", "torchvision")}
    except metadata.PackageNotFoundError:
        return False
    hooked = any(getattr(finder, "__name__", "") == "TorchvisionFinder" for finder in sys.meta_path)
    return builds != {""} and not hooked and "cpu" in builds
