"""Tools that a policy may call: a schema that every call is held to, and whether the tool reads or writes."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

# A call longer than this is refused unread; what it costs to look at one stays bounded.
MAX_CHARACTERS = 10_000
MAX_ANSWER = 160  # characters of an InvalidCall, all of them ASCII

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class Access(enum.IntEnum):
    """What a tool does to an environment's state, and what a caller may do."""

    READ = 0
    WRITE = 1


class InvalidCall(ValueError):
    """A call that cannot be done. Its text is for the policy: what was wrong, and what would be right."""


@dataclass(frozen=True)
class Tool:
    """A function that the policy may call by name.

    Attributes:
      name: how.
      schema: JSON schema (draft 2020-12) of its arguments, an object.
      access: a READ tool sees the state through `frozen`, so that it cannot change it.
      run: (state, arguments) -> result; InvalidCall for arguments that fit the schema and still make no sense.
      description: for the prompt.
    """

    name: str
    schema: Mapping[str, Any]
    access: Access
    run: Callable[[Any, Mapping[str, Any]], Any]
    description: str = ""

    def __post_init__(self) -> None:
        from jsonschema import Draft202012Validator, SchemaError

        try:
            Draft202012Validator.check_schema(self.schema)
        except SchemaError as error:
            raise ValueError(f"tool {self.name!r}: its schema is no JSON schema: {error.message}") from None
        if not self.name or self.schema.get("type") != "object":
            raise ValueError(f"tool {self.name!r}: a tool has a name, and a schema of type 'object'")

    @cached_property
    def _validator(self) -> Any:
        from jsonschema import Draft202012Validator

        return Draft202012Validator(self.schema)

    @property
    def definition(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.schema)}
        return {"type": "function", "function": function}

    def call(self, state: Any, arguments: Any) -> Any:
        """Runs the tool.

        Raises:
          InvalidCall: the arguments do not fit the schema, or make no sense.
        """
        error = next(iter(self._validator.iter_errors(arguments)), None)
        if error is not None:
            # Named by its place, not repeated: what the policy wrote may be long, and in any script.
            raise InvalidCall(
                f"{self.name}: {ascii(error.json_path)[1:41]} does not fit {error.validator!r} of its schema"
            )
        return self.run(frozen(state) if self.access == Access.READ else state, arguments)


class Toolbox:
    """The tools of an environment and how far a caller may go with them.

    Args:
      tools: of different names.
      access: READ refuses every WRITE tool.
    """

    def __init__(self, tools: Sequence[Tool], access: Access = Access.READ):
        self.tools = {tool.name: tool for tool in tools}
        if len(self.tools) != len(tools):
            raise ValueError(f"tools need different names, not {[tool.name for tool in tools]}")
        self.access = access

    @property
    def definitions(self) -> tuple[dict[str, Any], ...]:
        """Of the tools that may be called, for `Environment.tools`."""
        return tuple(tool.definition for tool in self.tools.values() if tool.access <= self.access)

    def call(self, state: Any, name: str, arguments: Any) -> Any:
        """Runs a tool by name.

        Raises:
          InvalidCall: there is no such tool, it writes and the caller may not, or its arguments are wrong.
        """
        tool = self.tools.get(name)
        if tool is None or tool.access > self.access:
            allowed = ", ".join(one.name for one in self.tools.values() if one.access <= self.access)
            what = "there is no tool" if tool is None else "you may only read, not call"
            raise InvalidCall(f"{what} {name[:30]!a}; you may call {allowed or 'none'}"[:MAX_ANSWER])
        return tool.call(state, arguments)


def parse_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """The call in a turn of the policy: (name, arguments); None where it makes none.

    The form is Qwen's: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, one in a turn.

    Raises:
      InvalidCall: something that starts as a call and is none.
    """
    if "<tool_call>" not in text:
        return None
    if len(text) > MAX_CHARACTERS:
        raise InvalidCall(f"a turn with a call has at most {MAX_CHARACTERS} characters")
    calls = _CALL.findall(text)
    if len(calls) != 1 or text.count("<tool_call>") != 1:
        raise InvalidCall("make one call in a turn: <tool_call>...</tool_call>")
    try:
        call = json.loads(calls[0], parse_constant=_refuse)
    except (ValueError, RecursionError):  # RecursionError: thousands of brackets
        raise InvalidCall('a call is JSON: {"name": ..., "arguments": {...}}') from None
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"} or not isinstance(call["name"], str):
        raise InvalidCall('a call is an object {"name": ..., "arguments": {...}}')
    if not isinstance(call["arguments"], dict):
        raise InvalidCall("the arguments of a call are an object")
    return call["name"], call["arguments"]


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def frozen(value: Any) -> Any:
    """The same data, to look at only: what would change it raises. Arrays are not copied.

    It keeps an honest tool from a mistake; Python cannot keep a hostile one from anything.

    Raises:
      TypeError: something that is not plain data, and could be changed from here.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, np.ndarray):
        view = value.view()
        view.flags.writeable = False
        return view
    if isinstance(value, Mapping):
        return MappingProxyType({key: frozen(inner) for key, inner in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(frozen(inner) for inner in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and value.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return dataclasses.replace(value, **{f.name: frozen(getattr(value, f.name)) for f in dataclasses.fields(value)})
    raise TypeError(f"a state of an environment is plain data; {type(value).__name__} cannot be shown read-only")
