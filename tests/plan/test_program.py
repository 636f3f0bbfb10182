"""What is read from compiled programs, against counts by hand and XLA's own, on 8 CPU devices and for a TPU slice."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from mindjax.plan import program
from mindjax.plan.compile import environment_for
from mindjax.plan.hardware import Topology
from mindjax.plan.hlo import parse, replica_groups
from tests.plan.programs import HIDDEN, INNER, LAYERS, LAYOUT, ROWS, TOKENS

ROOT = Path(__file__).resolve().parents[2]
STACKS = [(LAYERS, HIDDEN, INNER), (LAYERS, INNER, HIDDEN)]


@lru_cache
def compiled(topology: str, *names: str) -> dict[str, tuple[float, str]]:
    """Name -> (XLA's count of FLOPs, text)."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.plan.programs", topology, *names],
        env=environment_for(Topology.parse(topology)), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    return {name: (flops, text) for name, flops, text in lines}


def read(topology: str, name: str, *names: str) -> program.Program:
    return program.read(compiled(topology, *names)[name][1], LAYOUT.sizes)


def test_flops_are_xlas_own_where_nothing_loops() -> None:
    flops, text = compiled("cpu:8")["products"]
    tokens = ROWS // 2 * TOKENS // 4  # of a device
    assert program.read(text, LAYOUT.sizes).flops == flops
    assert flops == 2 * tokens * HIDDEN * INNER // 2 + 2 * tokens * (TOKENS // 4) * HIDDEN


def test_loops_count_as_often_as_they_run() -> None:
    flops, text = compiled("cpu:8")["nested"]
    once = 2 * (ROWS // 2 * TOKENS // 4) * HIDDEN * HIDDEN
    assert once <= flops < 1.1 * once  # XLA takes the bodies of both loops once
    assert program.read(text, LAYOUT.sizes).flops == 15 * once


@pytest.mark.parametrize("topology", ["cpu:8", "v5p:2x2x2"])
def test_step_against_a_count_by_hand(topology: str) -> None:
    """The TPU's compiler writes no trip counts, products as convolutions, and exchanges in forms of its own."""
    found = read(topology, "scanned", *(("scanned",) if topology != "cpu:8" else ()))
    rows, tokens = ROWS // 2, TOKENS // 4
    product = 2 * rows * (2 * tokens) * HIDDEN * (INNER // 2)
    assert found.flops == LAYERS * 8 * product  # two products, once forward, once recomputed, twice backward
    assert not found.unknown_loops and not found.uncounted
    size = 4 if topology == "cpu:8" else 2  # bytes of a number
    x = rows * tokens * HIDDEN * size
    weights = HIDDEN * INNER // 4 * size
    by_hand = {
        # Two weights gathered forward and again for the backward pass, their gradients scattered.
        "fsdp": LAYERS * 6 * weights,
        # Tokens gathered and scattered forward, recomputed, and backward.
        "tensor": LAYERS * 6 * x,
        # Exchanges of half of x: two forward, the first recomputed, two backward; a permutation each way; then both
        # weights' gradients are summed.
        "sequence": LAYERS * (5 * x // 2 + 2 * x) + 2 * LAYERS * weights,
    }
    for c in found.collectives:
        if c.kind == "all-reduce" and c.times == LAYERS:  # in which the TPU's compiler scatters some gradients
            by_hand["fsdp"] += c.times * int(c.sent["fsdp"]) // 2
    # And the loss, a number or two over all.
    assert found.sent == pytest.approx(by_hand, abs=32)
    kinds = {c.kind for c in found.collectives}
    assert kinds >= {"all-gather", "reduce-scatter", "all-to-all", "collective-permute", "all-reduce"}
    assert not program.unexpected(found, STACKS, INNER, LAYOUT.sizes)


def test_whole_weights_and_logits_are_noticed() -> None:
    (weights,) = program.unexpected(read("cpu:8", "gathered_at_once"), STACKS, INNER, LAYOUT.sizes)
    assert weights.result.dims[0] == LAYERS and set(weights.sent) == {"fsdp"}
    (logits,) = program.unexpected(read("cpu:8", "gathered_logits"), STACKS, INNER, LAYOUT.sizes)
    assert logits.result.dims[-1] == INNER and set(logits.sent) == {"tensor"}


def groups(text: str) -> list[tuple[int, ...]]:
    line = f"  ROOT %x = f32[4]{{0}} all-reduce(%p), channel_id=1, {text}, use_global_device_ids=true, to_apply=%add"
    module = parse(
        "HloModule m\n\nENTRY %main (p: f32[4]) -> f32[4] {\n  %p = f32[4]{0} parameter(0)\n" + line + "\n}\n"
    )
    return replica_groups(module.entry.root, 8)


@pytest.mark.parametrize(
    ("text", "first", "axes"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (0, 4), ("data",)),
        ("replica_groups={}", tuple(range(8)), ("data", "fsdp", "tensor")),
        ("replica_groups=[4,2]<=[8]", (0, 1), ("tensor",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4), ("data",)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5), ("data", "tensor")),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", (0, 1), ("tensor",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6), ("data", "fsdp")),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2), ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", (0, 1), ("tensor",)),
    ],
)
def test_groups_in_every_form(text: str, first: tuple[int, ...], axes: tuple[str, ...]) -> None:
    found = groups(text)
    assert found[0] == first
    assert sorted(device for group in found for device in group) == list(range(8))
    assert program.axes_of(found, {"data": 2, "fsdp": 2, "tensor": 2}) == axes


def test_unknown_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="form that this does not read"):
        groups("replica_groups=@somewhere")


def test_another_number_of_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="is for 8 devices, the mesh has 2"):
        program.read(compiled("cpu:8")["products"][1], {"data": 2})


def test_shares_of_an_exchange_over_two_axes_add_up() -> None:
    """An all-reduce over 2 x 4 devices sends 2 x 7/8 of what one device holds, whichever way it is split."""
    for kind, whole in (("all-reduce", 2 * 7 / 8), ("reduce-scatter", 7 / 8), ("all-gather", 7.0)):
        shares = program._shares(kind, 1.0, ("data", "tensor"), 8, {"data": 2, "tensor": 4})
        assert sum(shares.values()) == pytest.approx(whole) and set(shares) == {"data", "tensor"}
