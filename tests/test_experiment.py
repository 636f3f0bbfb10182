"""Experiment files: sizes, overrides, and the way from a config to dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from ml_collections import ConfigDict, config_dict

from mindjax.experiment import apply_override, load_experiment, to_dataclass

ROOT = Path(__file__).resolve().parent.parent
FILE = """
from ml_collections import ConfigDict
SIZES = ("debug", "moe")
def get_config(size=""):
    return ConfigDict(dict(
        kind="sft", steps=2 if size == "debug" else 100, name="a", flag=False, maybe=None, shape=(1, 2), names=("x",),
        optim=dict(lr=1e-3, warmup=10, nested=dict(beta=0.9)),
    ))
"""


@pytest.fixture
def experiment(tmp_path: Path) -> str:
    path = tmp_path / "example.py"
    path.write_text(FILE)
    return str(path)


def test_size_reaches_the_file(experiment: str) -> None:
    assert load_experiment(experiment).steps == 100
    assert load_experiment(f"{experiment}:debug").steps == 2


def test_unknown_size_lists_the_sizes(experiment: str) -> None:
    with pytest.raises(ValueError, match=r"no size 'debgu'.*:debug.*:moe.*did you mean 'debug'"):
        load_experiment(f"{experiment}:debgu")


def test_missing_file_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no experiment file"):
        load_experiment(str(tmp_path / "nothing.py"))


def test_file_without_sizes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def get_config(size=''): ...")
    with pytest.raises(ValueError, match="does not define SIZES"):
        load_experiment(str(path))


def test_config_is_locked(experiment: str) -> None:
    config = load_experiment(experiment)
    with pytest.raises((KeyError, AttributeError)):
        config.new = 1
    with pytest.raises((KeyError, AttributeError)):
        config.optim.new = 1


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("--config.optim.lr=1e-5", "optim.lr", 1e-5),
        ("--config.optim.lr=1", "optim.lr", 1.0),
        ("optim.nested.beta=0.5", "optim.nested.beta", 0.5),
        ("--config.steps=7", "steps", 7),
        ("--config.name=b=c", "name", "b=c"),
        ("--config.name=3", "name", "3"),
        ("--config.flag=true", "flag", True),
        ("--config.flag=0", "flag", False),
        ("--config.maybe=3", "maybe", 3),
        ("--config.maybe=text", "maybe", "text"),
        ("--config.maybe=(1, 2.5)", "maybe", (1, 2.5)),
        ("--config.shape=(3, 4, 5)", "shape", (3, 4, 5)),
        ("--config.shape=3,4", "shape", (3, 4)),
        ("--config.shape=(3,)", "shape", (3,)),
        ("--config.names=y,z", "names", ("y", "z")),
    ],
)
def test_override_takes_the_type_of_the_field(experiment: str, override: str, key: str, value: Any) -> None:
    node: Any = load_experiment(experiment, [override])
    for part in key.split("."):
        node = node[part]
    assert node == value and type(node) is type(value)


def test_override_of_a_placeholder() -> None:
    config = ConfigDict({"seed": config_dict.placeholder(int)})
    apply_override(config, "--config.seed=3")
    assert config.seed == 3
    with pytest.raises(ValueError, match="seed has to be int"):
        apply_override(config, "--config.seed=x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optim.lrr=1", "no key 'optim.lrr'; did you mean 'optim.lr'"),
        ("--config.optmi.lr=1", "did you mean 'optim.lr'"),
        ("--config.warmup=1", "did you mean 'optim.warmup'"),  # the right name in the wrong place
        ("--config.name.deeper=1", "no key 'name.deeper'"),
        ("--config.steps=1.5", r"steps has to be int \(now 100\), got '1.5'"),
        ("--config.optim.lr=fast", "optim.lr has to be float"),
        ("--config.flag=maybe", "flag has to be bool"),
        ("--config.shape=1,x", "shape has to be tuple"),
        ("--config.optim=1", "group of keys.*optim.lr, optim.nested.beta, optim.warmup"),
        ("--config.steps", "not of the form --config.KEY=VALUE"),
    ],
)
def test_wrong_override_says_what_and_how(experiment: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_experiment(experiment, [override])


@dataclass(frozen=True)
class Inner:
    lr: float
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str
    kind: Literal["a", "b"] = "a"
    path: Path | None = None
    sizes: tuple[int, ...] = ()
    inners: tuple[Inner, ...] = ()
    scales: dict[str, float] = field(default_factory=dict)
    flag: bool = False
    optional: Inner | None = None


def test_to_dataclass_builds_every_level() -> None:
    config = ConfigDict(
        {
            "inner": {"lr": 1, "betas": [0.5, 0.6]},
            "name": "n",
            "path": "/x",
            "sizes": [1, 2],
            "inners": ({"lr": 0.1}, {"lr": 0.2}),
            "scales": {"vision": 1},
            "optional": {"lr": 3.0},
        }
    )
    assert to_dataclass(Outer, config.lock()) == Outer(
        inner=Inner(1.0, betas=(0.5, 0.6)),
        name="n",
        path=Path("/x"),
        sizes=(1, 2),
        inners=(Inner(0.1), Inner(0.2)),
        scales={"vision": 1.0},
        optional=Inner(3.0),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "x"}, "Outer has no key 'nmae'; did you mean 'name'"),
        ({"inner": {"lr": 1.0, "warmpu": 1}}, "Inner has no key 'inner.warmpu'; did you mean 'inner.warmup'"),
        ({"inner": {}}, "Inner needs inner.lr"),
        ({"inner": {"lr": "x"}}, r"inner.lr has to be float, got 'x' \(str\)"),
        ({"inner": {"lr": True}}, "inner.lr has to be float"),
        ({"inner": {"lr": 1.0, "warmup": True}}, "inner.warmup has to be int"),
        ({"inner": {"lr": 1.0, "betas": [0.1]}}, "inner.betas has to be tuple"),
        ({"inner": 3}, "inner has to be Inner"),
        ({"kind": "c"}, "kind is 'c'; it can be 'a', 'b'"),
        ({"sizes": [1, "x"]}, r"sizes\[1\] has to be int"),
        ({"flag": 1}, "flag has to be bool"),
        ({"name": None}, "name has to be str"),
        ({"optional": {"lr": None}}, "optional.lr has to be float"),
    ],
)
def test_to_dataclass_refuses(change: dict[str, Any], message: str) -> None:
    config = {"inner": {"lr": 0.1}, "name": "n", **change}
    with pytest.raises(ValueError, match=message):
        to_dataclass(Outer, ConfigDict(config))


def test_to_dataclass_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="Outer needs inner, name"):
        to_dataclass(Outer, ConfigDict({}))


def test_every_experiment_of_ours_loads_at_every_size() -> None:
    from mindjax.cli import KINDS

    for path in sorted((ROOT / "experiments").glob("*.py")):
        if path.name == "__init__.py":
            continue
        sizes = _sizes(path)
        assert "debug" in sizes, f"{path.name} has no debug size"
        for size in ("", *sizes):
            config = load_experiment(f"{path}:{size}" if size else str(path))
            assert config.kind in KINDS and config.is_locked


def _sizes(path: Path) -> tuple[str, ...]:
    namespace: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace["SIZES"]
