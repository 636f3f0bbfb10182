"""The command line: what reaches a main loop, and what a person reads when something is wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mindjax import cli

FILE = """
from ml_collections import ConfigDict
SIZES = ("debug",)
def get_config(size=""):
    return ConfigDict(dict(kind="sft", steps=2 if size else 100, optim=dict(lr=1e-3)))
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Path]]:
    """An experiment `example.py` in the working directory, whose loop notes its calls here."""
    (tmp_path / "example.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    made: list[tuple[Any, Path]] = []
    _install_loop(monkeypatch, lambda config, workdir: made.append((config, workdir)))
    return made


def _install_loop(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    module = ModuleType("example_loop")
    module.main = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "example_loop", module)
    monkeypatch.setitem(cli.KINDS, "sft", "example_loop:main")


@pytest.mark.parametrize("command", ["run", "sft"])
def test_experiment_reaches_its_loop(calls: list[tuple[Any, Path]], command: str) -> None:
    assert cli.main([command, "--config=example.py:debug", "--config.optim.lr=1e-5"]) == 0
    ((config, workdir),) = calls
    assert (config.steps, config.optim.lr) == (2, 1e-5)
    assert workdir == Path("runs/example-debug")
    assert json.loads((workdir / "config.json").read_text())["optim"] == {"lr": 1e-5}
    versions = json.loads((workdir / "versions.json").read_text())
    assert {"python", "jax", "flax", "mindjax"} <= versions.keys()


def test_workdir_without_a_size_and_by_name(calls: list[tuple[Any, Path]]) -> None:
    cli.main(["run", "--config=example.py"])
    cli.main(["run", "--config", "example.py", "--workdir", "elsewhere/x"])
    assert [workdir for _, workdir in calls] == [Path("runs/example"), Path("elsewhere/x")]


def test_same_run_resumes_and_another_config_is_refused(
    calls: list[tuple[Any, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--config=example.py"]) == 0
    assert cli.main(["run", "--config=example.py"]) == 0
    assert cli.main(["run", "--config=example.py", "--config.optim.lr=0.5"]) == 2
    assert "optim.lr: was 0.001, is 0.5" in capsys.readouterr().err
    assert len(calls) == 2
    assert cli.main(["run", "--config=example.py", "--config.optim.lr=0.5", "--change-config"]) == 0
    assert len(Path("runs/example/command.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--config=example.py", "--config.optim.lrr=1"], "did you mean 'optim.lr'?"),
        (["run", "--config=example.py:debg"], "did you mean 'debug'?"),
        (["run", "--config=missing.py"], "there is no experiment file missing.py"),
        (["run", "--config=example.py", "--workdri=x"], "did you mean --workdir?"),
        (["run", "--config=example.py", "--optim.lr=1"], "--config.KEY=VALUE"),
        (["dpo", "--config=example.py"], "is of kind 'sft'"),
        (["convert", "a", "b", "--dytpe=float32"], "did you mean --dtype?"),
    ],
)
def test_mistake_is_one_clear_line(
    calls: list[tuple[Any, Path]], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not calls and not Path("runs").exists()
    assert cli.main([*arguments, "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unknown_kind_lists_the_kinds(calls: list[tuple[Any, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--config=example.py", "--config.kind=sfd"]) == 2
    assert "pipeline, mgpo, sft, rl, dpo, eval, results" in capsys.readouterr().err


def test_interrupt_says_how_to_go_on(
    calls: list[tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(config: Any, workdir: Path) -> None:
        raise KeyboardInterrupt

    _install_loop(monkeypatch, stop)
    assert cli.main(["run", "--config=example.py", "--config.optim.lr=1"]) == 130
    assert "mindjax run --config=example.py --config.optim.lr=1" in capsys.readouterr().err


def test_missing_extra_is_named(
    calls: list[tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def needs(name: str) -> Callable[..., None]:
        def function(config: Any, workdir: Path) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return function

    _install_loop(monkeypatch, needs("sklearn.datasets"))
    assert cli.main(["run", "--config=example.py"]) == 2
    assert "pip install 'mindjax[quickstart]'" in capsys.readouterr().err
    _install_loop(monkeypatch, needs("mindjax.misspelt"))  # a mistake of ours keeps its traceback
    with pytest.raises(ModuleNotFoundError):
        cli.main(["run", "--config=example.py"])


def test_convert_passes_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from mindjax.models import hf_weights

    seen: list[Any] = []
    monkeypatch.setattr(hf_weights, "convert", lambda *args, **kwargs: seen.append((args, kwargs)))
    assert cli.main(["convert", "a", "b", "--dtype", "bfloat16", "--layout=transformers"]) == 0
    assert seen == [(("a", "b"), {"dtype": "bfloat16", "layout": "transformers", "source_layout": None})]


def test_generate_takes_the_published_arguments() -> None:
    arguments = cli.build_parser().parse_args(
        "generate DIR --messages m.json --max-new-tokens 7 --temperature 0 --dtype float32 --ignore-eos --json".split()
    )
    assert arguments.model_dir == "DIR" and arguments.messages == Path("m.json") and arguments.max_new_tokens == 7
    assert arguments.temperature == 0 and arguments.dtype == "float32" and arguments.seed == 0
    assert arguments.ignore_eos and arguments.json


@pytest.mark.parametrize("target", [*cli.KINDS.values(), "mindjax.bench:main", "mindjax.inference.generate:main"])
def test_every_command_has_its_function(target: str) -> None:
    module, function = target.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_huge_pages_are_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: starts.append(arguments))
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/mindjax", "sft", "--config", "x.py"])
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=1")
    setting = tmp_path / "enabled"
    for text in (None, "[always] madvise never", "always madvise [never]"):
        if text is not None:
            setting.write_text(text)
        cli._with_huge_pages(setting)
    assert not starts
    setting.write_text("always [madvise] never")
    for _ in range(2):
        cli._with_huge_pages(setting)
    assert starts == [[sys.executable, "/bin/mindjax", "sft", "--config", "x.py"]]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.perturb=1:glibc.malloc.hugetlb=1"


def test_help_is_light_and_names_every_command() -> None:
    program = (
        "import sys; from mindjax import cli\ntry: cli.main(['--help'])\n"
        "finally: print('heavy:', *(m for m in ('jax', 'numpy', 'ml_collections') if m in sys.modules))"
    )
    text = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    for command in ("run", "sft", "rl", "dpo", "eval", "generate", "convert", "bench", "doctor"):
        assert f"\n    {command} " in text
    assert "heavy:\n" in text
