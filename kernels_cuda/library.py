"""Finds and loads the compiled kernels, and says what is missing."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

ABI_VERSION = 4  # MJK_ABI_VERSION of include/launch.h
BACKENDS = ("cpu", "cuda")
PACKAGE = Path(__file__).resolve().parent
BUILD = "cmake -S kernels_cuda -B build/kernels && cmake --build build/kernels (or pip install the package again)"


@dataclass(frozen=True)
class Library:
    """One backend's library.

    Attributes:
      path: the file, None where there is none.
      handle: loaded, None where it cannot be used.
      problem: why not and what to do, "" where it can.
    """

    path: Path | None
    handle: ctypes.CDLL | None
    problem: str


def folders(backend: str) -> list[Path]:
    """Where a library is looked for: $MINDJAX_KERNELS alone where it is set, else a clone's build, the package."""
    named = os.environ.get("MINDJAX_KERNELS")
    return [Path(named), Path(named) / backend] if named else [PACKAGE.parent / "build" / "kernels" / backend, PACKAGE]


@functools.cache
def load(backend: str) -> Library:
    """The library of a backend, "cpu" or "cuda", loaded once; never raises for one that is missing or broken."""
    assert backend in BACKENDS
    name = f"libmindjax_{backend}.so"
    path = next((folder / name for folder in folders(backend) if (folder / name).is_file()), None)
    if path is None:
        return Library(None, None, _how_to_build(backend))
    try:
        handle = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        handle.mjk_isa.restype = handle.mjk_last_error.restype = ctypes.c_char_p
        version = handle.mjk_abi_version()
    except (OSError, AttributeError) as error:
        return Library(path, None, f"{path} does not load ({error}); build it again: {BUILD}")
    if version != ABI_VERSION:
        problem = f"{path} has ABI {version}, not {ABI_VERSION}; build it again: {BUILD}"
        return Library(path, None, problem)
    return Library(path, handle, "")


def _how_to_build(backend: str) -> str:
    compiler = {"cpu": _compiler(), "cuda": nvcc()}[backend]
    if compiler:
        return f"not built; build it: {BUILD}"
    missing = {
        "cpu": "no C++ compiler: install g++ or clang++ (Debian: apt-get install g++)",
        "cuda": "no nvcc: install the CUDA toolkit or set CUDA_HOME",
    }[backend]
    return f"not built, and {missing}, then {BUILD}"


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next((found for name in (named, "c++", "g++", "clang++") if name and (found := shutil.which(name))), None)


def nvcc() -> str | None:
    """The path of the CUDA compiler, on PATH or in $CUDA_HOME."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
