"""Reads the text of an optimised XLA program: computations, instructions, shapes, trip counts of loops."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Bytes of an element; types that are not here (tokens, opaque) take no memory.
BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1,
    "f8e8m0fnu": 1, "f4e2m1fn": 0.5,
}  # fmt: skip

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
# replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}; the order of the devices may be left out.
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\],? ?(?:device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\) ?)?\{([^}]*)\}"
)
_NAMES = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
      dtype: as XLA writes it.
      dims: sizes of the dimensions.
      space: memory it lives in: 0 is the device's main memory, others are on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * BYTES.get(self.dtype, 0)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in its computation.
      opcode: as XLA writes it.
      arrays: of the result; several for a tuple, nested tuples flattened.
      operands: names of instructions of the same computation.
      attributes: the text after the operands.
      literal: the text between the parentheses: the number of a parameter, the value of a constant.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str
    is_root: bool

    @property
    def bytes(self) -> float:
        """Of the whole result."""
        return sum(array.bytes for array in self.arrays)

    @cached_property
    def source(self) -> str:
        """The path of the operation in the program that was traced, "" where XLA made it up."""
        found = re.search(r'\bmetadata=\{[^}]*op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def called(self, key: str) -> list[str]:
        """Names of the computations under an attribute such as `calls` or `branch_computations`."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return _NAMES.findall(found.group(1)) if found else []

    def integers(self, key: str) -> list[int]:
        """The numbers of an attribute such as `lhs_contracting_dims={1,2}`."""
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return [int(n) for n in found.group(1).split(",") if n] if found else []


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions.values()) if i.is_root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Number -> instruction."""
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclass(frozen=True)
class Module:
    """A whole program.

    Attributes:
      computations: by name.
      entry: where it starts.
    """

    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """The text that `Compiled.as_text()` gives.

    Raises:
      ValueError: where there is no entry computation, which means that this is not such a text.
    """
    computations: dict[str, Computation] = {}
    entry, name = None, ""
    instructions: dict[str, Instruction] | None = None
    for line in _whole_lines(text):
        if instructions is None:
            header = _HEADER.match(line)
            if header:
                name, instructions = header.group(2), {}
                entry = name if header.group(1) else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions)
            instructions = None
        elif instruction := _instruction(line):
            instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("this is not the text of an optimised XLA program: it has no ENTRY computation")
    return Module(computations, computations[entry])


def _whole_lines(text: str) -> Iterator[str]:
    """Lines of the text; attributes of a kernel may hold line breaks."""
    held = ""
    for line in text.splitlines():
        if line.startswith(("  ", "}, execution_thread")) or line == "}" or not held.startswith("  "):
            if held:
                yield held
            held = line
        else:
            held += line
    yield held


def _instruction(line: str) -> Instruction | None:
    line = re.sub(r"/\*.*?\*/", "", line.strip())
    is_root = line.startswith("ROOT ")
    name, equals, rest = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _matching(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    arrays = tuple(_array(found) for found in _ARRAY.finditer(rest[:end]))
    rest = rest[end:].lstrip()
    start = rest.index("(")
    close = _matching(rest, start)
    literal = rest[start + 1 : close]
    operands = () if rest[:start] in ("constant", "parameter") else tuple(_NAMES.findall(literal))
    return Instruction(
        name.lstrip("%"), rest[:start], arrays, operands, rest[close + 1 :].lstrip(", "), literal, is_root
    )


def _array(found: re.Match[str]) -> Array:
    dims = tuple(int(d.replace("<=", "")) for d in found.group(2).split(",") if d)
    space = re.search(r"S\((\d+)\)", found.group(3) or "")
    return Array(found.group(1), dims, int(space.group(1)) if space else 0)


def _matching(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses in {text[:120]!r}")


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a while loop runs; None where the program does not say.

    The CPU's compiler writes it down. The TPU's does not: there it follows from the condition, which compares a counter
    with a constant, and from where the counter starts and by how much it grows.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    (condition,), (body,) = ([module.computations[name] for name in loop.called(key)] for key in ("condition", "body"))
    root, sides = condition.root, condition.operands(condition.root)
    if root.opcode == "fusion":
        inner = module.computations[root.called("calls")[0]]
        root = inner.root
        sides = [sides[int(side.literal)] if side.opcode == "parameter" else side for side in inner.operands(root)]
    if root.opcode != "compare" or len(sides) != 2:
        return None
    direction = re.search(r"direction=(\w+)", root.attributes)
    index = _tuple_index(sides[0])
    end = _constant(condition, sides[1])
    if direction is None or direction.group(1) not in ("LT", "NE") or index is None or end is None:
        return None
    start = _start_of(computation, loop, index)
    step = _step_of(module, body, index)
    return None if start is None or not step else max(0, -(-(end - start) // step))


def _constant(computation: Computation, instruction: Instruction) -> int | None:
    """The value of an integer constant, seen through copies."""
    while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start", "reshape"):
        operands = computation.operands(instruction)
        if len(operands) != 1:
            return None
        instruction = operands[0]
    if instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.literal.strip()):
        return None
    return int(instruction.literal)


def _tuple_index(instruction: Instruction) -> int | None:
    if instruction.opcode != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found.group(1)) if found else None


def _start_of(computation: Computation, loop: Instruction, index: int) -> int | None:
    operands = computation.operands(loop)
    if not operands or operands[0].opcode != "tuple":
        return None
    return _constant(computation, computation.operands(operands[0])[index])


def _step_of(module: Module, body: Computation, index: int) -> int | None:
    """By how much the counter grows: its new value is the old one and a constant."""
    if body.root.opcode != "tuple":
        return None
    where, new = body, body.operands(body.root)[index]
    while new.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        new = where.operands(new)[0]
    if new.opcode == "fusion":
        where = module.computations[new.called("calls")[0]]
        new = where.root
    if new.opcode != "add":
        return None
    steps = [step for side in where.operands(new) if (step := _constant(where, side)) is not None]
    return steps[0] if steps else None


def replica_groups(instruction: Instruction, devices: int) -> list[tuple[int, ...]]:
    """The groups that a collective exchanges within; of a permutation its (source, target) pairs.

    Args:
      devices: of the program; an empty list of groups means one group of all.

    Raises:
      ValueError: for a form that this does not read.
    """
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    if pairs:
        return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, base, order = ([int(n) for n in (part or "").split(",") if n] for part in iota.groups())
        ids = np.arange(math.prod(base)).reshape(base)
        return [tuple(row) for row in (ids.transpose(order) if order else ids).reshape(shape).tolist()]
    mesh = _MESH.search(text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    explicit = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    if explicit is None:
        raise ValueError(f"the groups of {instruction.name} are in a form that this does not read: {text[:200]}")
    groups = [tuple(int(n) for n in part.split(",")) for part in re.findall(r"\{([\d,]+)\}", explicit.group(1))]
    return groups or [tuple(range(devices))]


def _mesh_groups(axes: str, base: str | None, order: str | None, named: str) -> list[tuple[int, ...]]:
    """Groups along named axes of a mesh; `'a':(2)4` is the part of size 4 of axis a that has a part of 2 before it."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    shape: list[int] = []
    inside: list[int] = []
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in
             re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)}  # fmt: skip
    for name, size in sizes.items():
        before, own = parts.get(name, (1, 1))
        inside += [len(shape) + 1] if name in parts else []
        shape += [before, own, size // (before * own)]
    count = math.prod(sizes.values())
    ids = np.arange(count)
    if base:
        dims = [int(n) for n in base.split(",")]
        ids = ids.reshape(dims).transpose([int(n) for n in order.split(",")] if order else range(len(dims)))
    ids = ids.reshape(shape)
    outside = [d for d in range(len(shape)) if d not in inside]
    return [
        tuple(row) for row in ids.transpose(*outside, *inside).reshape(-1, math.prod(shape[d] for d in inside)).tolist()
    ]


def fused_bytes(module: Module, instruction: Instruction, operands: Sequence[Instruction]) -> float:
    """What a fusion moves to and from main memory: of an operand that it only slices, the slices alone."""
    inner = module.computations[instruction.called("calls")[0]]
    total = 0.0
    for number, operand in enumerate(operands):
        if number in inner.parameters:
            total += _read(inner, inner.parameters[number], operand)
    roots = inner.operands(inner.root) if inner.root.opcode == "tuple" else [inner.root]
    for array, root in zip(instruction.arrays, roots, strict=False):
        if array.space == 0:
            total += _written(inner, root, array)
    return total


def _read(inner: Computation, parameter: Instruction, operand: Instruction) -> float:
    whole = sum(array.bytes for array in operand.arrays if array.space == 0)
    users, slices = [parameter], 0.0
    seen = set()
    while users:
        source = users.pop()
        for user in inner.instructions.values():
            if source.name not in user.operands or (source.name, user.name) in seen:
                continue
            seen.add((source.name, user.name))
            if user.opcode in ("bitcast", "copy", "convert", "reshape"):
                users.append(user)
            elif user.opcode in ("dynamic-slice", "gather", "slice"):
                slices += user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
                continue  # written in place
            else:
                return whole
    return min(whole, slices)


def _written(inner: Computation, root: Instruction, array: Array) -> float:
    while root.opcode in ("bitcast", "copy", "convert", "reshape") and inner.operands(root):
        root = inner.operands(root)[0]
    if root.opcode == "dynamic-update-slice":
        return min(array.bytes, inner.operands(root)[1].bytes)
    return array.bytes
