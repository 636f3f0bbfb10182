"""Lets torchvision be imported where its compiled part cannot load (a CUDA build beside a CPU build of torch).

vLLM and transformers' Qwen processors import torchvision, which on import describes the ops `nms` and `qnms` of
its compiled part and fails when nobody declared them. `python -m mindjax.interop.torchvision_ops` copies this file
into the environment with a `.pth` line, so that every process there, vLLM's workers too, declares them when (and
only when) torchvision is first imported. It imports nothing heavy: every Python start in the environment runs it.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as `typing` has it, whose import would double a Python start
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
INSTALLED_NAME = "_mindjax_torchvision_ops"


class TorchvisionFinder:
    """A meta path finder that finds torchvision as usual, and declares its ops just before it runs."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None or spec.origin is None:
            return spec
        run, origin = spec.loader.exec_module, spec.origin

        def exec_module(module: ModuleType) -> None:
            declare_ops(origin)
            run(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def declare_ops(origin: str) -> None:
    """Declares what the compiled part beside torchvision's `__init__.py` (`origin`) would, if that cannot load."""
    from pathlib import Path

    import torch

    for library in Path(origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(library)
            return
        except (ImportError, OSError):
            pass
    # Kept on torch itself: the declarations end with the object.
    torch._mindjax_torchvision_library = library = torch.library.Library("torchvision", "DEF")
    for schema in OPS:
        library.define(schema)


def activate() -> None:
    """Puts the finder in front, once."""
    if not any(getattr(finder, "__name__", "") == TorchvisionFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder)


def install() -> str:
    """Installs this file as a start-up hook of the running environment; returns where."""
    import shutil
    import sysconfig
    from pathlib import Path

    site_packages = Path(sysconfig.get_paths()["purelib"])
    shutil.copyfile(__file__, site_packages / f"{INSTALLED_NAME}.py")
    hook = site_packages / f"{INSTALLED_NAME}.pth"
    hook.write_text(f"import {INSTALLED_NAME}; {INSTALLED_NAME}.activate()\n")
    return str(hook)


if __name__ == "__main__":
    print(install())
