"""Machines to plan for: one table of chips, and how the devices of a topology are wired."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: what a topology's name starts with.
      kind: "tpu", "gpu", or "cpu".
      flops: FLOP/s of dense bfloat16 products, peak.
      hbm: bytes of main memory that a program may use.
      bandwidth: bytes/s of main memory.
      clock: Hz of the unit that the compiler's estimates count in; 0 where it gives none.
      link: bytes/s of one link between neighbours, one way. Of a GPU, all its links inside a node together.
      network: bytes/s of one device to devices beyond its torus or node, one way.
      torus: dimensions of the torus, or 0: devices of a node are all neighbours.
      wrap: a dimension of the torus is closed where it is a multiple of this; inside a node it is of no use.
      node: devices that are wired to each other (GPU), or hang on one host (TPU).
      source: where the numbers come from.
    """

    name: str
    kind: str
    flops: float
    hbm: float
    bandwidth: float
    clock: float
    link: float
    network: float
    torus: int
    wrap: int
    node: int
    source: str


_TPU = "docs.cloud.google.com/tpu/docs/"
_NVIDIA = "NVIDIA's data sheet (dense bfloat16); ConnectX-7, one 400 Gb/s port a GPU, as in DGX and HGX systems"
# Links: the documents give a chip's interconnect in both directions; a chip has two links for each dimension of the
# torus, so one link one way is that over four times the dimensions. The clock is the peak over what the matrix units
# do in a cycle: 4 x 128 x 128 (v5e), twice that (v5p), 4 x 256 x 256 (v6e) multiplications.
# Network: v5p 50 Gb/s a chip as documented, v5e 2 x 100 Gb/s of a host's 8 chips, v6e 4 x 200 Gb/s of a host's 8 chips.
# Memory: of a TPU what libtpu 0.0.42 names as available when a program does not fit (the documented 16 GiB and 32 GiB
# less a reserve; of v5p the documented 95 GiB, for libtpu names more). Of a GPU 95 % of what the driver shows (81,559
# and 143,771 MiB), with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 197e12, 15.75 * GIB, 819e9, 1.5e9, 50e9, 3.1e9, 2, 16, 4, _TPU + "v5e"),
        Chip("v5p", "tpu", 459e12, 95 * GIB, 2765e9, 1.75e9, 100e9, 6.2e9, 3, 4, 4, _TPU + "v5p"),
        Chip("v6e", "tpu", 918e12, 31.25 * GIB, 1638e9, 1.75e9, 100e9, 12.5e9, 2, 16, 4, _TPU + "v6e"),
        Chip("h100", "gpu", 989e12, 75.6 * GIB, 3350e9, 0.0, 450e9, 50e9, 0, 1, 8, _NVIDIA),
        Chip("h200", "gpu", 989e12, 133.3 * GIB, 4800e9, 0.0, 450e9, 50e9, 0, 1, 8, _NVIDIA),
        # Virtual devices that share this machine's cores: to try plans and layouts out. Orders of magnitude.
        Chip("cpu", "cpu", 50e9, 2 * GIB, 5e9, 0.0, 2e9, 2e9, 0, 1, 1024, "no real device"),
    )
}


@dataclass(frozen=True)
class Topology:
    """Devices of one kind and their arrangement.

    Attributes:
      chip: of the table.
      shape: chips along each dimension of the torus; of GPUs (nodes, GPUs of a node).
    """

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Topology:
        """From "v5p:4x4x4" (chips, which are devices), or "h100:64" (GPUs).

        Raises:
          ValueError: an unknown chip, or a shape that it does not come in.
        """
        found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.lower())
        if found is None or found.group(1) not in CHIPS:
            kind = name.partition(":")[0].lower()
            near = difflib.get_close_matches(kind, CHIPS, 1, 0.4)
            hint = f"did you mean {near[0]!r}?" if near and near[0] != kind else f"chips are {', '.join(CHIPS)}"
            raise ValueError(f"topology {name!r}: write CHIP:SHAPE, such as v5p:4x4x4, v6e:4x4 or h100:64; {hint}")
        chip = CHIPS[found.group(1)]
        shape = tuple(int(n) for n in found.group(2).split("x"))
        if min(shape) < 1:
            raise ValueError(f"topology {name!r}: every size must be 1 or more")
        if chip.kind != "tpu":
            count = math.prod(shape)
            if count > chip.node and count % chip.node:
                raise ValueError(f"topology {name!r}: beyond one node, {chip.name} come in multiples of {chip.node}")
            return cls(chip, (-(-count // chip.node), min(count, chip.node)))
        if len(shape) != chip.torus:
            example = "x".join(["4"] * chip.torus)
            raise ValueError(
                f"topology {name!r}: a {chip.name} slice has {chip.torus} dimensions, such as {chip.name}:{example}; "
                "this counts chips, not cores"
            )
        if any(size % 2 for size in shape[:2]):
            raise ValueError(f"topology {name!r}: hosts hold 2x2 chips, so the first two sizes must be even")
        return cls(chip, shape)

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        if self.chip.kind != "tpu":
            return f"{self.chip.name}:{self.devices}"
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def links(self, places: np.ndarray) -> float:
        """Bytes/s, one way, that a device has for exchanges within a group.

        A ring along a closed dimension of the torus sends both ways round; along an open one the way back goes over
        the same devices, so that half is left; a group over several dimensions uses the links of all. A group that
        takes every second or fourth device of a line shares its links with the groups between.

        Args:
          places: [group, dimensions] coordinates of its devices on the torus, or (node, number in it) of GPUs.
        """
        chip = self.chip
        if len(places) < 2:
            return math.inf
        if chip.kind != "tpu":
            return chip.link if len(np.unique(places[:, 0])) == 1 else chip.network
        total = 0.0
        for dimension, size in enumerate(self.shape):
            used = np.unique(places[:, dimension])
            if len(used) < 2:
                continue
            closed = len(used) == size and size % chip.wrap == 0
            shared = int(np.diff(used).min())  # devices between two neighbours of the group, and one
            total += chip.link * (2 if closed else 1) / shared
        return total

    def axis_links(self, mesh: np.ndarray, axes: Sequence[str], names: Sequence[str]) -> float:
        """`links` of groups along these mesh axes; the slowest group decides.

        Args:
          mesh: [*sizes of the mesh, dimensions] coordinates of the devices.
          axes: along which the group lies.
          names: of all axes of the mesh.
        """
        inside = [names.index(axis) for axis in axes]
        outside = [i for i in range(len(names)) if i not in inside]
        groups = mesh.transpose(*outside, *inside, len(names))
        groups = groups.reshape(-1, math.prod(mesh.shape[i] for i in inside), mesh.shape[-1])
        # The groups of a regular mesh are alike but for their place; a few show the slowest.
        return min(self.links(group) for group in groups[:: max(1, len(groups) // 8)])


def places(topology: Topology, sizes: Sequence[int]) -> np.ndarray:
    """Coordinates of the devices of a mesh, [*sizes, dimensions], as the compiler's own choice puts them.

    Axes of the mesh take dimensions of the torus whole where they can, the last axis first, as
    `jax.experimental.mesh_utils` does; here by a plain rule that needs no device objects.
    """
    if topology.chip.kind != "tpu":
        order = np.stack(np.unravel_index(np.arange(topology.devices), topology.shape), axis=-1)
        return order.reshape(*sizes, 2)
    left = list(topology.shape)
    parts: list[list[tuple[int, int, int]]] = []  # of each axis: (dimension, size taken, stride)
    for size in reversed(sizes):
        taken = []
        while size > 1:
            whole = [d for d, n in enumerate(left) if n > 1 and n == size] or [
                d for d, n in enumerate(left) if n > 1 and size % n == 0
            ]
            dimension = max(whole, key=lambda d: left[d]) if whole else max(
                range(len(left)), key=lambda d: math.gcd(left[d], size)
            )  # fmt: skip
            share = math.gcd(left[dimension], size)
            if share == 1:
                raise ValueError(f"a mesh of {tuple(sizes)} does not fit the torus {topology.name}")
            stride = topology.shape[dimension] // left[dimension]
            taken.append((dimension, share, stride))
            left[dimension] //= share
            size //= share
        parts.append(taken)
    parts.reverse()
    result = np.zeros((*sizes, len(topology.shape)), int)
    for axis, taken in enumerate(parts):
        index = np.arange(sizes[axis])
        for dimension, share, stride in taken:
            column = (index % share) * stride
            result[..., dimension] += column.reshape([-1 if i == axis else 1 for i in range(len(sizes))])
            index = index // share
    return result
