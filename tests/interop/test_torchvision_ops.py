"""The start-up hook that lets torchvision import beside a CPU build of torch."""

from __future__ import annotations

import subprocess
import sys

HEAVY = "print(*(m for m in ('torch', 'torchvision', 'typing', 'pathlib') if m in sys.modules))"


def run(program: str, *options: str) -> str:
    result = subprocess.run([sys.executable, *options, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_environment_imports_torchvision_and_its_ops() -> None:
    """In a plain new process, as vLLM starts them."""
    out = run("import torchvision.ops, torch; print(torch.ops.torchvision.nms.default._schema)")
    assert "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" in out


def test_looking_for_torchvision_does_not_load_torch() -> None:
    """transformers asks whether torchvision is there each time that it is imported."""
    out = run("import importlib.util, sys; print(importlib.util.find_spec('torchvision') is not None); " + HEAVY)
    assert out.split()[0] == "True" and "torch" not in out.split()[1:]


def test_hook_itself_imports_nothing() -> None:
    """-S -I: without the environment's own hooks, which bring modules along."""
    from mindjax.interop import torchvision_ops

    program = f"import sys; exec(open({torchvision_ops.__file__!r}).read(), {{'__name__': 'hook'}}); {HEAVY}"
    assert run(program, "-S", "-I").strip() == ""


def test_without_torchvision_nothing_changes() -> None:
    from mindjax.interop import torchvision_ops

    program = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        f"space = {{'__name__': 'hook'}}; exec(open({torchvision_ops.__file__!r}).read(), space); space['activate']()\n"
        "try: import torchvision\nexcept ModuleNotFoundError as error: print(error)"
    )
    assert "No module named 'torchvision'" in run(program, "-S", "-I")


def test_activate_twice_adds_one_finder() -> None:
    from mindjax.interop import torchvision_ops

    before = list(sys.meta_path)
    try:
        torchvision_ops.activate()
        torchvision_ops.activate()
        names = [getattr(finder, "__name__", "") for finder in sys.meta_path]
        assert names.count("TorchvisionFinder") == 1
    finally:
        sys.meta_path[:] = before
