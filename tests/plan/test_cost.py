"""The cost model: its counts against the parameters, its laws of growth, and the real step as XLA compiles it."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from mindjax.models import qwen3_vl
from mindjax.models.catalog import CATALOG
from mindjax.plan import program
from mindjax.plan.compile import compile_step
from mindjax.plan.cost import Job, check, estimate, parameters, useful_flops
from mindjax.plan.hardware import Topology
from mindjax.plan.plan import stacks
from sharding.layout import Layout

DENSE, MOE = CATALOG["qwen3-vl-8b"], CATALOG["qwen3-vl-30b-a3b"]


def job(layout: str = "", model: str = "qwen3-vl-30b-a3b", **changes: int) -> Job:
    return replace(Job(CATALOG[model], Layout.parse(layout), batch=64, length=8192), **changes)


@pytest.mark.parametrize("name", CATALOG)
def test_parameters_are_counted(name: str) -> None:
    model = CATALOG[name]
    real = sum(leaf.size for leaf in jax.tree.leaves(qwen3_vl.abstract_params(model)))
    assert sum(parameters(model).values()) == pytest.approx(real, rel=2e-3)


def test_useful_flops_are_six_for_each_active_weight_and_the_causal_scores() -> None:
    text, count, tokens = MOE.text, parameters(MOE), 64 * 8192
    active = count["attention"] + count["router"] + text.vocab_size * text.hidden_size + count["experts"] * 8 / 128
    scores = 6 * tokens * 8192 * 32 * 128 * 48
    assert useful_flops(job()) == pytest.approx(6 * active * tokens + scores)
    assert 2.9e9 < active < 3.6e9  # "A3B"


def test_more_devices_share_the_same_work() -> None:
    flops = {n: sum(estimate(job(f"fsdp={n}")).flops.values()) for n in (1, 4, 16)}
    assert flops[4] == pytest.approx(flops[1] / 4) and flops[16] == pytest.approx(flops[1] / 16)


def test_growth_with_length() -> None:
    """At equal tokens scores grow with the length, all other products do not."""
    short, long = (estimate(job("fsdp=8", length=n, batch=2**22 // n)).flops for n in (8192, 32768))
    # Of 512 x 512 tiles a causal mask leaves (n + 1) / 2 n.
    tiles = (65 / 128) / (17 / 32)
    assert long["attention scores"] == pytest.approx(4 * tiles * short["attention scores"])
    assert long["experts"] == pytest.approx(short["experts"]) and long["head"] == pytest.approx(short["head"])


def test_experts_cost_memory_and_no_flops() -> None:
    def cost(experts: int) -> tuple[float, float]:
        model = replace(MOE, text=replace(MOE.text, num_experts=experts))
        found = estimate(replace(job("fsdp=8"), model=model))
        return sum(found.flops.values()) - found.flops["router"], found.memory["parameters"]

    (few_flops, few), (many_flops, many) = cost(16), cost(128)
    assert many_flops == few_flops
    weights = 3 * 2048 * 768 * 48 * 4 / 8  # of one expert in all layers, on a device
    assert many - few == pytest.approx(112 * weights, rel=1e-3)  # and the router's columns


def test_state_is_split() -> None:
    whole, split = (estimate(job(layout)).memory for layout in ("fsdp=4", "fsdp=16,tensor=2,expert=2"))
    assert whole["optimizer"] == 2 * whole["parameters"]
    assert split["parameters"] < whole["parameters"] / 8


def test_each_axis_sends_what_it_should() -> None:
    def axes(layout: str) -> set[str]:
        return {axis for axis, size in estimate(job(layout)).sent.items() if size}

    assert axes("") == set()
    assert axes("data=4") == {"data"} and axes("fsdp=4") == {"fsdp"} and axes("tensor=4") == {"tensor"}
    assert axes("sequence=4") == {"sequence"} and axes("stage=4") == {"stage"} and axes("expert=4") == {"expert"}


def test_the_bubble_costs_time() -> None:
    few, many = (sum(estimate(job(f"stage=4,pipeline_microbatches={parts}")).flops.values()) for parts in (4, 32))
    # (S - 1) of M + S - 1 ticks: 3 / 7 against 3 / 35; embedding, head and vision have no bubble.
    assert 1.4 < few / many < (7 / 4) / (35 / 32)


@pytest.mark.parametrize("remat", ["none", ("attention", "qkv"), "full"])
def test_recompute_trades_memory_for_flops(remat: str | tuple[str, ...]) -> None:
    everything, this, nothing = (estimate(replace(job("fsdp=16"), remat=r)) for r in ("full", remat, "none"))
    assert sum(nothing.flops.values()) <= sum(this.flops.values()) <= sum(everything.flops.values())
    kept = [c.memory["saved activations"] for c in (everything, this, nothing)]
    assert kept == sorted(kept)


@pytest.mark.parametrize(
    ("layout", "advice"),
    [
        ("tensor=3", "3"),
        ("fsdp=64", "use --batch 128"),
        ("expert=3", "experts cannot be split"),
        ("stage=64", "too few"),
    ],
)
def test_what_does_not_divide_reads_like_advice(layout: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        check(job(layout, batch=96))


def test_against_the_real_step_on_cpu_devices() -> None:
    """One compiled step: its FLOPs as expected, exchanges along the layout's axes alone, nothing gathered whole."""
    one = Job(
        CATALOG["tiny"], Layout(data=2, fsdp=2, tensor=2), batch=8, length=256, images=1, image_tokens=36, remat="full"
    )
    compiled = compile_step(one, Topology.parse("cpu:8"))
    found, expected = program.read(compiled.text, one.layout.sizes), estimate(one, fused=False)
    assert found.flops == pytest.approx(sum(expected.flops.values()), rel=0.1)
    assert set(found.sent) == {"data", "fsdp", "tensor"} == {axis for axis, size in expected.sent.items() if size}
    assert not found.unknown_loops
    assert not program.unexpected(found, stacks(one.model), one.model.text.vocab_size, one.layout.sizes)
    assert compiled.memory["parameters"] == pytest.approx(expected.memory["parameters"], rel=0.05)
    assert compiled.memory["optimizer"] == pytest.approx(expected.memory["optimizer"], rel=0.05)
    assert compiled.total >= sum(compiled.memory[kind] for kind in ("parameters", "optimizer", "batch"))
