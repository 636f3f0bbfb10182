"""Experiment files: loading one with a size and overrides, and turning its config into frozen dataclasses.

An experiment file is a recipe without logic. It defines

    SIZES = ("debug", "moe")                          # what may follow the colon; "debug" is always there
    def get_config(size: str = "") -> ConfigDict: ...

and is named on the command line as `experiments/quickstart.py` or `experiments/quickstart.py:debug`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")


def load_experiment(path_with_size: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads an experiment's config, applies the overrides and locks it.

    Args:
      path_with_size: `FILE.py` or `FILE.py:SIZE`; a path that is not there is also looked for beside the installed
        `experiments` package.
      overrides: `--config.optim.lr=1e-5` or `optim.lr=1e-5`, read as the type that the field already has.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the size or a key is not known, or a value does not have the field's type.
    """
    name, _, size = path_with_size.partition(":")
    path = _find(name)
    spec = spec_from_file_location(f"mindjax_experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for attribute in ("get_config", "SIZES"):
        if not hasattr(module, attribute):
            raise ValueError(f"{path} is not an experiment: it does not define {attribute}")
    if size and size not in module.SIZES:
        sizes = ", ".join(f"{name}:{known}" for known in module.SIZES)
        raise ValueError(f"{name} has no size {size!r}; it has {name} and {sizes}{_suggest(size, module.SIZES)}")
    config = module.get_config(size)
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config of {path} returned a {type(config).__name__}, not a ConfigDict")
    config.unlock()
    for override in overrides:
        apply_override(config, override)
    config.lock()
    return config


def _find(name: str) -> Path:
    import experiments

    installed = Path(experiments.__file__ or "").parent
    for path in (Path(name), installed.parent / name):
        if path.is_file():
            return path
    known = [f"experiments/{path.name}" for path in sorted(installed.glob("*.py")) if path.name != "__init__.py"]
    raise FileNotFoundError(f"there is no experiment file {name}; known: {', '.join(known)}{_suggest(name, known)}")


def apply_override(config: ConfigDict, override: str) -> None:
    """Sets one existing field of `config` from `KEY=VALUE`, with or without a leading `--config.`.

    Raises:
      ValueError: not of that form, no such key, or a value of another type than the field's.
    """
    key, equals, text = override.removeprefix("--").removeprefix("config.").partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} is not of the form --config.KEY=VALUE")
    keys = _dotted_keys(config)
    *parents, leaf = key.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict) or leaf not in node:
        raise ValueError(f"the config has no key {key!r}{_suggest(key, keys)}")
    if isinstance(node[leaf], ConfigDict):
        inside = ", ".join(f"{key}.{name}" for name in _dotted_keys(node[leaf]))
        raise ValueError(f"{key!r} is a group of keys, not a value; set one of {inside}")
    value = _parse(text, node[leaf], node.get_type(leaf), key)
    with node.ignore_type():
        node[leaf] = value


def to_dataclass(cls: type[T], config: Any) -> T:
    """Builds the (nested, frozen) dataclass `cls` from a `ConfigDict` or a mapping, whose keys all have to be fields.

    A field may be a dataclass, `bool`, `int`, `float`, `str`, `Path`, `Literal`, `tuple`, `dict` or `Optional` of
    these. An `int` is accepted for a `float`, a list for a tuple, nothing else is converted.

    Raises:
      ValueError: for an unknown key (with the nearest known one), a missing one, or a value of the wrong type.
    """
    return _build(cls, config, prefix="")


def _build(cls: type[T], config: Any, prefix: str) -> T:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in config:
        if key not in fields:
            near = _suggest(prefix + key, [prefix + name for name in fields])
            raise ValueError(f"{cls.__name__} has no key {prefix + key!r}{near}")
    missing = [
        prefix + name
        for name, field in fields.items()
        if name not in config
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise ValueError(f"{cls.__name__} needs {', '.join(missing)}, which the config does not set")
    return cls(**{key: _convert(config[key], hints[key], prefix + key) for key in config})


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotation `hint` wants it, or a ValueError that names `key`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1:
            return _convert(value, options[0], key)
        for option in options:
            try:
                return _convert(value, option, key)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise ValueError(f"{key} is {value!r}; it can be {', '.join(map(repr, arguments))}{_suggest(value, arguments)}")
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping | ConfigDict):
            return _build(hint, value, prefix=f"{key}.")
    elif origin is tuple and isinstance(value, tuple | list):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value))
        if len(value) == len(arguments):
            return tuple(_convert(item, arguments[i], f"{key}[{i}]") for i, item in enumerate(value))
    elif (origin is dict or origin is Mapping) and isinstance(value, Mapping | ConfigDict):
        return {name: _convert(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{key} has to be {_name(hint)}, got {value!r} ({type(value).__name__})")


def _parse(text: str, current: Any, kind: type, key: str) -> Any:
    """`text` as a value of type `kind`, the type of the field whose value is `current`."""
    if kind is str:
        return text
    if kind is type(None):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if kind in (tuple, list):
            items = [item.strip().strip("'\"") for item in text.strip().strip("()[]").split(",")]
            kinds = {type(item) for item in current or ()}
            if len(kinds) == 1:
                (item_kind,) = kinds
                return kind(_parse(item, None, item_kind, key) for item in items if item)
            return kind(_parse(item, None, type(None), key) for item in items if item)
    except (ValueError, KeyError):
        pass
    raise ValueError(f"{key} has to be {_name(kind)} (now {current!r}), got {text!r}")


def _dotted_keys(config: ConfigDict) -> list[str]:
    keys: list[str] = []
    for key in config:
        value = config[key]
        keys += [f"{key}.{inner}" for inner in _dotted_keys(value)] if isinstance(value, ConfigDict) else [key]
    return keys


def _suggest(wrong: str, known: Iterable[str]) -> str:
    """'; did you mean X?' with the nearest of `known`, where there is one; the right name in a wrong place counts."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(wrong), names, n=1, cutoff=0.6)
    if not near:
        leaf = str(wrong).rpartition(".")[2]
        leaves = {name.rpartition(".")[2]: name for name in names}
        near = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    return f"; did you mean {near[0]!r}?" if near else ""


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
