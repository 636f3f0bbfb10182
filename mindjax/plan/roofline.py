"""Seconds from FLOPs and bytes: of a compiled program, and of the cost model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mindjax.plan.cost import Cost
from mindjax.plan.hardware import Topology, places
from mindjax.plan.program import Program

# Of peak, what products reach where no compiler's estimate is at hand. libtpu 0.0.42 estimates 88 to 96 % for those of
# 4,096 and 8,192 alone, and 44 to 89 % for those of the 8B model's layers on v6e, with which other work is fused.
PRODUCTS = 0.6
# The same of an attention kernel, whose softmax keeps the other units busy: an assumption, nothing here measures it.
ATTENTION = 0.5
# Seconds for one step of a ring, whatever it carries.
HOP = 1e-6
# Of the bytes of an axis, the sums of gradients, for which libtpu 0.0.42 waits. Weights travel while layers compute.
SUMMED = {"fsdp": 1 / 3, "data": 1.0}


@dataclass(frozen=True)
class Prediction:
    """Times of one step on one device, and how they were joined.

    Attributes:
      compute: seconds of the products at peak.
      memory: seconds of the traffic to main memory at its bandwidth.
      links: mesh axis -> seconds of its exchanges.
      kernels: seconds of all kernels, each at the slower of its two limits.
      exposed: seconds of exchanges that nothing hides.
      step: seconds of the whole.
      mfu: useful FLOPs of the step at this time, over the peak.
      slowest: (what, seconds), longest first.
      assumptions: what the numbers rest on, as sentences.
    """

    compute: float
    memory: float
    links: dict[str, float]
    kernels: float
    exposed: float
    step: float
    mfu: float
    slowest: tuple[tuple[str, float], ...]
    assumptions: tuple[str, ...] = field(default=())


class Wires:
    """Bandwidths of the axes of a mesh on a topology."""

    def __init__(self, topology: Topology, sizes: Mapping[str, int], mesh: np.ndarray | None = None):
        """
        Args:
          topology: the devices.
          sizes: mesh axis -> size.
          mesh: [*sizes, dimensions] coordinates of the devices; by `hardware.places` where it is None.
        """
        self.topology, self.sizes = topology, dict(sizes)
        self._mesh = places(topology, tuple(sizes.values())) if mesh is None else mesh
        self._found: dict[str, float] = {}

    def bandwidth(self, axis: str) -> float:
        """Bytes/s, one way, of a device along an axis."""
        if axis not in self._found:
            self._found[axis] = self.topology.axis_links(self._mesh, (axis,), tuple(self.sizes))
        return self._found[axis]

    def seconds(self, kind: str, axis: str, sent: float, times: float) -> float:
        """Of one kind of exchange, `sent` bytes at a time."""
        if not sent:
            return 0.0
        size, chip, bandwidth = self.sizes[axis], self.topology.chip, self.bandwidth(axis)
        if chip.kind == "tpu" and kind == "collective-permute":
            bandwidth = min(bandwidth, chip.link)  # to one neighbour
        # On a ring, a byte for any device passes a quarter of them.
        hops = max(1.0, size / 4) if chip.kind == "tpu" and kind.endswith("all-to-all") else 1.0
        return times * (sent * hops / bandwidth + HOP * max(1, size // 2))


def of_program(program: Program, useful: float, wires: Wires) -> Prediction:
    """What a compiled program will take.

    Args:
      program: on one device.
      useful: FLOPs that the mathematics asks of one device.
      wires: of its mesh.
    """
    chip = wires.topology.chip
    parts: dict[str, float] = {}
    kernels = 0.0
    for op in program.ops:
        reached = ATTENTION if op.kind.startswith("splash") else 1.0
        seconds = max(
            op.flops / (chip.flops * reached), op.bytes / chip.bandwidth, op.cycles / chip.clock if chip.clock else 0.0
        )
        kernels += seconds * op.times
        name = _short(op.source) or op.kind
        parts[name] = parts.get(name, 0.0) + seconds * op.times
    links: dict[str, float] = {}
    hidden = 0.0
    for collective in program.collectives:
        for axis, sent in collective.sent.items():
            seconds = wires.seconds(collective.kind, axis, sent, collective.times)
            links[axis] = links.get(axis, 0.0) + seconds
            hidden += seconds if collective.asynchronous else 0.0
            name = f"{collective.kind} over {axis}"
            parts[name] = parts.get(name, 0.0) + seconds
    exposed = sum(links.values()) - hidden
    step = max(kernels, hidden) + exposed
    return Prediction(
        program.flops / chip.flops, program.bytes / chip.bandwidth, links, kernels, exposed, step,
        useful / chip.flops / step if step else 0.0, _longest(parts),
        (
            "a kernel takes the longest of its FLOPs at peak, its bytes at the bandwidth of main memory, and the "
            f"compiler's own estimate of cycles; attention kernels reach {ATTENTION:.0%} of peak",
            "exchanges that the compiler starts early and waits for later are hidden behind kernels; others are not",
            *_links(wires),
        ),
    )  # fmt: skip


def of_cost(cost: Cost, wires: Wires) -> Prediction:
    """What the cost model expects."""
    chip = wires.topology.chip
    parts = {
        name: max(cost.flops[name] / (chip.flops * _reached(name)), cost.hbm[name] / chip.bandwidth)
        for name in {*cost.flops, *cost.hbm}
    }
    kinds = {"sequence": "all-to-all", "expert": "all-to-all", "stage": "collective-permute"}
    links = {axis: wires.seconds(kinds.get(axis, ""), axis, sent, 1) for axis, sent in cost.sent.items() if sent}
    summed = dict(SUMMED)
    chips = wires.topology
    if chips.chip.kind == "tpu" and wires.sizes["fsdp"] == chips.devices > 1 and "fsdp" in links:
        # libtpu makes an all-reduce, twice the bytes, of a reduce-scatter whose group is the whole slice.
        links["fsdp"], summed["fsdp"] = links["fsdp"] * 4 / 3, 1 / 2
    kernels = sum(parts.values())
    exposed = sum(seconds * summed.get(axis, 1.0) for axis, seconds in links.items())
    hidden = sum(links.values()) - exposed
    step = max(kernels, hidden) + exposed
    return Prediction(
        sum(cost.flops.values()) / chip.flops, sum(cost.hbm.values()) / chip.bandwidth, links, kernels, exposed, step,
        cost.useful / chip.flops / step, _longest(parts | {f"exchanges over {axis}": s for axis, s in links.items()}),
        (
            f"products reach {PRODUCTS:.0%} of peak, those of attention {ATTENTION:.0%}; each part takes the longer of "
            "its products and its bytes",
            "weights that travel over fsdp are hidden behind kernels; sums of gradients and all other exchanges are "
            "not",
            *_links(wires),
        ),
    )  # fmt: skip


def _reached(name: str) -> float:
    return ATTENTION if name.endswith("scores") else PRODUCTS


def _links(wires: Wires) -> tuple[str, ...]:
    chip = wires.topology.chip
    rates = [f"{axis} {wires.bandwidth(axis) / 1e9:.0f}" for axis, size in wires.sizes.items() if size > 1]
    if not rates:
        return ()
    wired = f"links of {chip.link / 1e9:.0f} GB/s one way"
    return (f"{wired}, which give the axes, in GB/s: {', '.join(rates)}; {HOP * 1e6:.0f} µs a step of a ring",)


def _longest(parts: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(parts.items(), key=lambda part: part[1], reverse=True)[:12])


def _short(source: str) -> str:
    """The last parts of a traced operation's path, with the pass it belongs to."""
    if not source:
        return ""
    steps = [
        step for step in source.split("/") if step not in ("while", "body", "closed_call", "shard_map", "checkpoint")
    ]
    kind = "recompute " if "rematted_computation" in steps else "backward " if "transpose(jvp" in source else ""
    named = [
        step for step in steps if not step.startswith(("jit(", "jvp(", "transpose(", "rematted", "cond", "branch"))
    ]
    return kind + " ".join(named[-2:])
