"""What a compiled program costs one device: FLOPs, memory traffic, exchanges by mesh axis, whatever repeats counted.

XLA's own counts take the body of a loop once; here everything is multiplied by how often it runs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mindjax.plan.hlo import Array, Computation, Instruction, Module, fused_bytes, parse, replica_groups, trip_count

# Exchanges, and for how many times its operand one axis of n devices sends, and how large the operand is on the next
# axis: rings, which are optimal on a torus. A group over two axes does first one, then the other.
_SENT: dict[str, Callable[[int], tuple[float, float]]] = {
    "all-gather": lambda n: (n - 1.0, float(n)),
    "reduce-scatter": lambda n: ((n - 1) / n, 1 / n),
    "all-reduce": lambda n: (2 * (n - 1) / n, 1 / n),
    "all-to-all": lambda n: ((n - 1) / n, 1.0),
    "ragged-all-to-all": lambda n: ((n - 1) / n, 1.0),
    "collective-permute": lambda n: (1.0, 0.0),
    "collective-broadcast": lambda n: (1.0, 0.0),
}
COLLECTIVES = tuple(_SENT)
# Neither move memory nor compute.
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id")


@dataclass(frozen=True)
class Collective:
    """One exchange.

    Attributes:
      kind: of `COLLECTIVES`.
      group: devices in one group.
      sent: mesh axis -> bytes that leave a device along it, each time; none where nothing does.
      times: how often it runs in a step.
      result: the largest array that it gives.
      source: the traced operation.
      asynchronous: whether the program starts it early and waits for it later.
    """

    kind: str
    group: int
    sent: dict[str, float]
    times: int
    result: Array
    source: str
    asynchronous: bool


@dataclass(frozen=True)
class Op:
    """One kernel.

    Attributes:
      source: the traced operation.
      kind: its opcode, or the target of a custom call.
      result: the largest array that it gives.
      flops: of products, each time.
      bytes: to and from main memory, each time.
      cycles: the compiler's own estimate, 0 where it gives none.
      times: how often it runs in a step.
    """

    source: str
    kind: str
    result: Array | None
    flops: float
    bytes: float
    cycles: float
    times: int


@dataclass(frozen=True)
class Program:
    """The costs of a compiled program on one device.

    Attributes:
      ops: kernels, collectives left out.
      collectives: exchanges.
      unknown_loops: loops whose number of rounds the program does not say; counted once.
      uncounted: targets of custom calls that state no cost, and how often they run.
    """

    ops: tuple[Op, ...]
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...] = ()
    uncounted: dict[str, int] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Of products, and of kernels that state theirs."""
        return sum(op.flops * op.times for op in self.ops)

    @property
    def bytes(self) -> float:
        """To and from main memory."""
        return sum(op.bytes * op.times for op in self.ops)

    @property
    def sent(self) -> dict[str, float]:
        """Mesh axis -> bytes that leave a device in a step."""
        total: dict[str, float] = {}
        for collective in self.collectives:
            for axis, size in collective.sent.items():
                total[axis] = total.get(axis, 0.0) + size * collective.times
        return total


def read(text: str, axes: dict[str, int]) -> Program:
    """Reads the text of an optimised program.

    Args:
      text: of `Compiled.as_text()`.
      axes: mesh axis -> size, in the order of the mesh, whose flattened devices the program numbers.

    Raises:
      ValueError: the text is not such a program, or its number of devices is not the mesh's.
    """
    module = parse(text)
    devices = math.prod(axes.values())
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    if (int(partitions.group(1)) if partitions else 1) != devices:
        raise ValueError(
            f"the program is for {partitions.group(1) if partitions else 1} devices, the mesh has {devices}"
        )
    reader = _Reader(module, axes)
    reader.visit(module.entry, 1)
    return Program(tuple(reader.ops), tuple(reader.collectives), tuple(reader.unknown), dict(reader.uncounted))


class _Reader:
    def __init__(self, module: Module, axes: dict[str, int]):
        self.module, self.axes = module, axes
        self.ops: list[Op] = []
        self.collectives: list[Collective] = []
        self.unknown: list[str] = []
        self.uncounted: Counter[str] = Counter()

    def visit(self, computation: Computation, times: int) -> None:
        for instruction in computation.instructions.values():
            self._visit(computation, instruction, times)

    def _visit(self, computation: Computation, instruction: Instruction, times: int) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            count = trip_count(self.module, computation, instruction)
            if count is None:
                self.unknown.append(instruction.source or instruction.name)
            for key in ("condition", "body"):
                for name in instruction.called(key):
                    self.visit(self.module.computations[name], times * (1 if count is None else count))
        elif opcode in ("call", "async-start"):
            for name in instruction.called("to_apply") or instruction.called("calls"):
                self.visit(self.module.computations[name], times)
        elif opcode == "conditional":
            self._conditional(instruction, times)
        elif opcode.removesuffix("-start") in _SENT:
            self.collectives.append(self._collective(computation, instruction, times))
        elif opcode in _FREE or opcode.endswith(("-done", "-update")):
            return
        else:
            self.ops.append(self._op(computation, instruction, times))

    def _conditional(self, instruction: Instruction, times: int) -> None:
        """The branch with most work, which is an upper bound."""
        names = [
            n
            for key in ("branch_computations", "true_computation", "false_computation")
            for n in instruction.called(key)
        ]
        branches = []
        for name in names:
            reader = _Reader(self.module, self.axes)
            reader.visit(self.module.computations[name], times)
            branches.append(reader)
        if branches:
            most = max(
                branches, key=lambda r: (sum(o.flops * o.times for o in r.ops), sum(o.bytes * o.times for o in r.ops))
            )
            self.ops += most.ops
            self.collectives += most.collectives
            self.unknown += most.unknown
            self.uncounted += most.uncounted

    def _op(self, computation: Computation, instruction: Instruction, times: int) -> Op:
        operands = computation.operands(instruction)
        kind, flops = instruction.opcode, 0.0
        if kind == "fusion":
            inner = self.module.computations[instruction.called("calls")[0]]
            flops, exchanged = self._inside(inner, times)
            size = fused_bytes(self.module, instruction, operands)
            # A fusion around an exchange moves what the exchange sends; it is counted there.
            size = 0.0 if exchanged and not flops else size
        else:
            flops = product_flops(computation, instruction)
            size = self._moved(instruction, operands)
        if kind == "custom-call":
            kind = _target(instruction)
            stated = re.search(
                r'"cost_estimate":\{"flops":"(\d+)"[^}]*"bytes_accessed":"(\d+)"', instruction.attributes
            )
            if stated:
                flops, size = float(stated.group(1)), float(stated.group(2))
            elif name := next((name for name in _KERNELS if instruction.name.startswith(name)), ""):
                kind, flops = name, _KERNELS[name](computation, operands)
            elif any(array.size > 1 for array in instruction.arrays) and kind not in _PASSIVE:
                self.uncounted[kind] += times
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        largest = max(instruction.arrays, key=lambda array: array.bytes, default=None)
        return Op(instruction.source, kind, largest, flops, size, float(cycles.group(1)) if cycles else 0.0, times)

    def _inside(self, computation: Computation, times: int) -> tuple[float, bool]:
        """FLOPs inside a fusion, and whether it holds an exchange, which is then recorded.

        The TPU's compiler can start a gather in one fusion, go on with it in those that compute meanwhile, and end it
        in another. The first counts.
        """
        flops, exchanged = 0.0, False
        targets = {_target(i) for i in computation.instructions.values() if i.opcode == "custom-call"}
        started = "AsyncCollectiveStart" in targets
        goes_on = "AsyncCollectiveDone" in targets or computation.name.startswith("async_collective_fusion")
        for instruction in computation.instructions.values():
            if instruction.opcode == "fusion":
                more, inner = self._inside(self.module.computations[instruction.called("calls")[0]], times)
                flops, exchanged = flops + more, exchanged or inner
            elif instruction.opcode.removesuffix("-start") in _SENT:
                exchanged = True
                if not goes_on:
                    self.collectives.append(self._collective(computation, instruction, times, started))
            else:
                flops += product_flops(computation, instruction)
        return flops, exchanged

    def _moved(self, instruction: Instruction, operands: Sequence[Instruction]) -> float:
        result = sum(array.bytes for array in instruction.arrays if array.space == 0)
        if instruction.opcode in ("copy-start", "slice-start"):  # (destination, source, context)
            return sum(array.bytes for array in instruction.arrays[:1])
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * result
        if instruction.opcode == "dynamic-update-slice":
            return 2 * operands[1].bytes
        if _target(instruction) in _PASSIVE:
            return 0.0
        return result + sum(array.bytes for operand in operands for array in operand.arrays if array.space == 0)

    def _collective(
        self, computation: Computation, instruction: Instruction, times: int, started: bool = False
    ) -> Collective:
        kind = instruction.opcode.removesuffix("-start")
        devices = math.prod(self.axes.values())
        groups = replica_groups(instruction, devices)
        operands = computation.operands(instruction)
        if kind == "ragged-all-to-all":
            operands = operands[:1]  # the rest are the output's buffer, sizes and offsets
        if kind == "all-reduce" and _is_reduce_scatter(computation, instruction):
            kind = "reduce-scatter"
        if kind == "collective-permute":
            groups = [pair for pair in groups if pair[0] != pair[1]]
        axes = axes_of(groups, self.axes)
        size = sum(operand.bytes for operand in operands[: 1 if kind == "collective-permute" else None])
        count = len(groups[0]) if groups else 1
        largest = max(instruction.arrays, key=lambda array: array.bytes)
        shares = _shares(kind, size, axes, count, self.axes)
        asynchronous = started or instruction.opcode.endswith("-start")
        return Collective(kind, count, shares, times, largest, instruction.source, asynchronous)


def _shares(kind: str, size: float, axes: Sequence[str], group: int, sizes: dict[str, int]) -> dict[str, float]:
    """What each of these axes sends for an operand of `size` bytes; the fastest axis, the last, comes first."""
    if kind == "collective-permute" or group != math.prod(sizes[axis] for axis in axes):
        # A permutation, or a part of an axis: as if along the one axis.
        return {axes[-1]: size * _SENT[kind](group)[0]} if axes else {}
    shares = {}
    for axis in reversed(axes):
        sent, left = _SENT[kind](sizes[axis])
        shares[axis] = size * sent
        size *= left
    return shares


# Kernels that state no cost: name -> FLOPs from the shapes of the operands.
_KERNELS: dict[str, Callable[[Computation, list[Instruction]], float]] = {
    # The TPU's compiler's own: softmax of scores [B, M, K], then their product with values [B, K, N].
    "online-softmax": lambda _, of: 2.0 * of[0].arrays[0].size * of[1].arrays[0].dims[-1],
    # Splash attention: two products forward, three for the gradient of queries, four for those of keys and values.
    "splash_mha_fwd": lambda where, of: 2 * _scores(where, of),
    "splash_mha_dq": lambda where, of: 3 * _scores(where, of),
    "splash_mha_dkv": lambda where, of: 4 * _scores(where, of),
}


def _scores(computation: Computation, operands: list[Instruction]) -> float:
    """FLOPs of one product of splash attention: of queries [..., T, D] with keys [..., S, D], visited blocks alone.

    Which blocks those are is a constant, that of a causal mask too long to be in the text.
    """
    block, (q, k) = operands[1], (operand.arrays[0].dims for operand in operands[2:4])
    rows, columns = block.arrays[0].dims[-2:]
    while block.opcode != "broadcast" and len(computation.operands(block)) == 1:
        block = computation.operands(block)[0]
    visited = 1.0 if block.opcode == "broadcast" or rows != columns else (rows + 1) / (2 * rows)
    return visited * 2.0 * math.prod(q) * k[-2]


# Custom calls that say something to the compiler and do nothing.
_PASSIVE = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
    "ConcatBitcast",
)


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found.group(1) if found else ""


def _is_reduce_scatter(computation: Computation, instruction: Instruction) -> bool:
    """The TPU's compiler writes a reduce-scatter as a fusion of an all-reduce and the slice that is kept."""
    root = computation.root
    return root.opcode == "dynamic-slice" and instruction.name in root.operands


def axes_of(groups: Iterable[Sequence[int]], sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ.

    Args:
      groups: numbers of devices in the flattened mesh.
      sizes: mesh axis -> size, in the order of the mesh.
    """
    varies = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), tuple(sizes.values())))
        varies |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, differs in zip(sizes, varies, strict=True) if differs)


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a `dot` or `convolution`, two for each multiplication; 0 for anything else.

    A convolution as XLA's own count has it: products that meet padding or the holes of a dilated operand are not
    made. The TPU's compiler writes batched products as such convolutions.
    """
    if instruction.opcode == "dot":
        left = computation.operands(instruction)[0].arrays[0].dims
        contracted = math.prod(left[d] for d in instruction.integers("lhs_contracting_dims"))
        return 2.0 * instruction.arrays[0].size * contracted
    if instruction.opcode != "convolution":
        return 0.0
    left, kernel = (operand.arrays[0].dims for operand in computation.operands(instruction)[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    inputs, kernels, outputs = labels.groups()
    window = dict(re.findall(r"(\w+)=([^\s}]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or [""])[0]))
    result = instruction.arrays[0].dims
    spatial = [label for label in kernels if label.isdigit()]
    positions = 1
    for number, label in enumerate(sorted(spatial)):
        positions *= _positions(
            left[inputs.index(label)], kernel[kernels.index(label)], result[outputs.index(label)],
            *(_window(window, key, number, default) for key, default in _WINDOW),
        )  # fmt: skip
    groups = {key: int((re.search(rf"{key}=(\d+)", instruction.attributes) or ["", "1"])[1]) for key in _GROUPS}
    features = kernel[kernels.index("i")]  # of one group already
    batch = left[inputs.index("b")] // groups["batch_group_count"]
    return 2.0 * features * kernel[kernels.index("o")] * batch * positions


_GROUPS = ("feature_group_count", "batch_group_count")
_WINDOW = (("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))


def _window(window: dict[str, str], key: str, number: int, default: str) -> int:
    parts = window.get(key, "").split("x")
    value = parts[number] if number < len(parts) and parts[number] else default
    return int(value.partition("_")[0])  # of padding the lower one decides


def _positions(size: int, kernel: int, out: int, stride: int, pad: int, dilate: int, kernel_dilate: int) -> int:
    """Pairs of an output place and a kernel place that meet an element of the input."""
    places = np.arange(out)[:, None] * stride - pad + np.arange(kernel)[None] * kernel_dilate
    return int(((places % dilate == 0) & (places >= 0) & (places // dilate < size)).sum())


def largest(program: Program, count: int = 5) -> list[Op]:
    """The kernels that give the largest arrays, one for each shape and operation."""
    found: dict[tuple[str, str], Op] = {}
    for op in sorted(program.ops, key=lambda op: op.result.bytes if op.result else 0, reverse=True):
        found.setdefault((str(op.result), op.source.rpartition("/")[2]), op)
        if len(found) == count:
            break
    return list(found.values())


def unexpected(
    program: Program, stacks: Sequence[tuple[int, ...]], vocabulary: int, axes: dict[str, int]
) -> list[Collective]:
    """Gathers that a good layout never makes: of all layers of a weight at once, or of logits.

    Args:
      program: compiled.
      stacks: shapes of the weights that are stacked over layers, [layers, ...], whole.
      vocabulary: the last dimension of logits.
      axes: mesh axis -> size: weights are gathered over some axes and stay split over others.
    """
    return [
        gather
        for gather in program.collectives
        if gather.kind == "all-gather" and _is_whole(gather, stacks, vocabulary, axes)
    ]


def _is_whole(gather: Collective, stacks: Sequence[tuple[int, ...]], vocabulary: int, axes: dict[str, int]) -> bool:
    dims = gather.result.dims
    widths = {size for stack in stacks for size in stack[1:]}
    if len(dims) >= 2 and dims[-1] == vocabulary and math.prod(dims[:-1]) not in widths:
        return True
    tensor, expert = axes.get("tensor", 1), axes.get("expert", 1)
    splits = {1, tensor, expert, tensor * expert}  # which may be left once fsdp is gathered
    for stack in stacks:
        layers = {-(-stack[0] // parts) for parts in _divisors(axes.get("stage", 1))}
        # Norms and biases of all layers together are small.
        if len(stack) < 3 or len(dims) != len(stack) or dims[0] not in layers or not _fits(dims[1:], stack[1:]):
            continue
        if math.prod(stack[1:]) // math.prod(dims[1:]) in splits:
            return True
    return False


def _fits(dims: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether these could be the dimensions of a weight, some of them a part of the whole."""
    return len(dims) == len(whole) and all(b % a == 0 for a, b in zip(sorted(dims), sorted(whole), strict=True))


def _divisors(number: int) -> Iterator[int]:
    return (n for n in range(1, number + 1) if number % n == 0)
