"""Topologies by name, the places of a mesh on a torus, and the bandwidth that its axes have there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mindjax.plan.hardware import CHIPS, Topology, places
from mindjax.plan.roofline import HOP, Wires


@pytest.mark.parametrize(
    ("name", "devices", "shape"),
    [("v5p:4x4x4", 64, (4, 4, 4)), ("v6e:16x16", 256, (16, 16)), ("V5P:2x2x1", 4, (2, 2, 1)), ("h100:64", 64, (8, 8)),
     ("h200:4", 4, (1, 4))],
)  # fmt: skip
def test_names(name: str, devices: int, shape: tuple[int, ...]) -> None:
    topology = Topology.parse(name)
    assert (topology.devices, topology.shape) == (devices, shape)
    assert Topology.parse(topology.name) == topology


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("v5:4x4", "did you mean 'v5"),
        ("v5p", "write CHIP:SHAPE"),
        ("v5p:4x4", "a v5p slice has 3 dimensions, such as v5p:4x4x4"),
        ("v6e:4x4x4", "has 2 dimensions"),
        ("v5p:3x4x4", "must be even"),
        ("h100:12", "multiples of 8"),
        ("v6e:0x4", "1 or more"),
    ],
)
def test_mistakes_read_like_advice(name: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        Topology.parse(name)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("v5p:4x4x4", (1, 16, 1, 1, 1, 4)), ("v6e:16x16", (2, 32, 1, 1, 4, 1)), ("v5p:8x8x16", (1, 128, 2, 1, 1, 4)),
     ("h100:64", (1, 8, 1, 1, 1, 8)), ("v5p:2x2x1", (4,))],
)  # fmt: skip
def test_every_device_has_one_place(name: str, sizes: tuple[int, ...]) -> None:
    topology = Topology.parse(name)
    mesh = places(topology, sizes)
    assert mesh.shape == (*sizes, len(topology.shape))
    assert len(np.unique(mesh.reshape(topology.devices, -1), axis=0)) == topology.devices
    assert (mesh.reshape(-1, len(topology.shape)).max(axis=0) < topology.shape).all()


def test_links_of_rings_lines_and_planes() -> None:
    torus, link = Topology.parse("v5p:4x4x4"), CHIPS["v5p"].link
    line = np.asarray([[i, 0, 0] for i in range(4)])
    assert torus.links(line) == 2 * link  # a closed ring goes both ways round
    assert torus.links(line[:2]) == link  # half of a dimension is no ring
    assert torus.links(line[::2]) == link / 2  # every second device shares with the others
    plane = np.asarray([[i, j, 0] for i in range(4) for j in range(4)])
    assert torus.links(plane) == 4 * link
    assert Topology.parse("v5p:2x2x1").links(np.asarray([[0, 0, 0], [1, 0, 0]])) == link  # too small to be closed
    assert Topology.parse("v6e:4x4").links(np.asarray([[i, 0] for i in range(4)])) == CHIPS["v6e"].link
    assert torus.links(line[:1]) == math.inf


def test_gpus_inside_a_node_and_beyond() -> None:
    wires = Wires(Topology.parse("h100:64"), {"fsdp": 8, "tensor": 8})
    assert wires.bandwidth("tensor") == CHIPS["h100"].link
    assert wires.bandwidth("fsdp") == CHIPS["h100"].network


def test_seconds_of_an_exchange() -> None:
    wires = Wires(Topology.parse("v5p:4x4x4"), {"fsdp": 16, "tensor": 4})
    assert wires.seconds("all-gather", "tensor", 2e9, 3) == pytest.approx(3 * (2e9 / 200e9 + 2 * HOP))
    assert wires.seconds("collective-permute", "tensor", 1e9, 1) == pytest.approx(1e9 / 100e9 + 2 * HOP)
    # Every byte passes four devices on average on a ring of sixteen.
    assert wires.seconds("all-to-all", "fsdp", 1e9, 1) == pytest.approx(4e9 / 400e9 + 8 * HOP)
    assert wires.seconds("all-gather", "fsdp", 0.0, 1) == 0.0
