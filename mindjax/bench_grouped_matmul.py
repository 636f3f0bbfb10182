"""`mindjax bench grouped_matmul`: our grouped product beside torch's and JAX's own, and the whole mixture of experts
beside transformers', on the same inputs in one run.

The bars of a product (of a row of the table): at most 1.3 times the larger of (one dense torch product of equal FLOPs)
and (the weights' bytes over the memory bandwidth measured here); at least twice as fast as the best form in JAX alone;
not slower than torch's grouped_mm. Of the layer: at least 3 times as fast as transformers', forward and backward.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mindjax.allocator import keep_freed_memory

SHAPES = ((2048, 1536), (768, 2048))  # (K, N) of gate_up and down
GROUPS = (8, 32, 128)
ROWS = (512, 4096, 16_384)
LAYERS = ("tiny-moe", "30b-a3b")
MOST_SECONDS = 3.0  # what takes longer is run once
BARS = {"of_floor": 1.3, "of_jax": 2.0, "of_torch_grouped": 1.0, "of_layer": 3.0}


def seconds_of(calls: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Medians of calls in turns, after one that warms up."""
    seconds: dict[str, list[float]] = {}
    for name, call in calls.items():
        call()
        seconds[name] = []
    for repetition in range(repetitions):
        for name, call in calls.items():
            if repetition and seconds[name][0] > MOST_SECONDS:
                continue
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bandwidth(threads: int, repetitions: int) -> float:
    """Bytes per second that `threads` threads read from memory, from an array far larger than private caches."""
    import torch

    torch.set_num_threads(threads)
    array = torch.ones(2**30 // 8, dtype=torch.int64)
    return 2**30 / min(seconds_of({"read": array.sum}, 1)["read"] for _ in range(repetitions))


def group_sizes(rows: int, groups: int) -> np.ndarray:
    """Uneven sizes as a router makes them: a multinomial draw."""
    return np.random.default_rng(0).multinomial(rows, np.full(groups, 1 / groups)).astype(np.int32)


def _batched(x: Any, w: Any, sizes: Any, *, most: int) -> Any:
    """JAX alone, by padding every group to the largest: one batched product between two gathers."""
    import jax.numpy as jnp
    from jax import lax

    starts = jnp.cumsum(sizes) - sizes
    padded = jnp.take(x, jnp.minimum(starts[:, None] + jnp.arange(most), len(x) - 1), axis=0)
    out = lax.dot_general(padded, w, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32).astype(x.dtype)
    group = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x))
    return out[group, jnp.arange(len(x)) - starts[group]]


def product(k: int, n: int, groups: int, rows: int, memory: float, repetitions: int) -> dict[str, Any]:
    """One row of the table: seconds of each form, and how they stand to the bars."""
    import jax
    import jax.numpy as jnp
    import torch

    from mindjax.ops.grouped_matmul import grouped_matmul

    rng, sizes = np.random.default_rng(0), group_sizes(rows, groups)
    x, w = (jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for shape in ((rows, k), (groups, k, n)))
    tx, tw = (torch.from_dlpack(array) for array in (x, w))
    ends, sizes_ = torch.from_numpy(np.cumsum(sizes).astype(np.int32)), jnp.asarray(sizes)
    ours = jax.jit(partial(grouped_matmul, implementation="cpu"))
    loop = jax.jit(partial(grouped_matmul, implementation="loop"))
    ragged = jax.jit(partial(grouped_matmul, implementation="ragged_dot"))
    batched = jax.jit(partial(_batched, most=int(sizes.max())))
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(x, w, sizes_).block_until_ready(),
        "torch dense": lambda: torch.mm(tx, tw[0]),
        "torch grouped_mm": lambda: torch.nn.functional.grouped_mm(tx, tw, offs=ends),
        "jax loop": lambda: loop(x, w, sizes_).block_until_ready(),
        "jax batched": lambda: batched(x, w, sizes_).block_until_ready(),
    }
    if 2 * rows * k * n * groups < 1e12:  # it does the work of every group for every row
        calls["jax ragged_dot"] = lambda: ragged(x, w, sizes_).block_until_ready()
    wanted = np.asarray(loop(x, w, sizes_), np.float32)
    error = np.linalg.norm(np.asarray(ours(x, w, sizes_), np.float32) - wanted) / np.linalg.norm(wanted)
    assert error < 5e-3, f"the forms differ by {error:.1e}"
    seconds = seconds_of(calls, repetitions)
    floor = max(seconds["torch dense"], int((sizes > 0).sum()) * k * n * 2 / memory)
    return {
        "k": k, "n": n, "groups": groups, "rows": rows, "seconds": seconds, "floor": floor,
        "of_floor": seconds["ours"] / floor,
        "of_jax": min(value for name, value in seconds.items() if name.startswith("jax")) / seconds["ours"],
        "of_torch_grouped": seconds["torch grouped_mm"] / seconds["ours"],
    }  # fmt: skip


def layer(name: str, tokens: int, dtype: str, repetitions: int) -> dict[str, Any]:
    """Forward and backward of the mixture of experts, ours and transformers', with the same weights and input.

    transformers runs its faster experts implementation (its loop over experts takes a minute at 30b-a3b).
    """
    import jax
    import jax.numpy as jnp
    import torch
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

    from mindjax.models.catalog import CATALOG
    from mindjax.models.moe import moe

    config = CATALOG["tiny-moe"].text
    if name == "30b-a3b":
        config = replace(config, hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    rng = np.random.default_rng(0)

    def draw(*shape: int, scale: float = 0.02) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * scale, dtype)

    params = {"router": draw(hidden, experts, scale=1.0), "gate_up": draw(experts, hidden, 2 * width)}
    params["down"] = draw(experts, width, hidden)
    x, g = draw(1, tokens, hidden, scale=1.0), draw(1, tokens, hidden, scale=1.0)
    segments = jnp.ones((1, tokens), jnp.int32)

    @jax.jit
    def ours(params: Any, x: jax.Array, g: jax.Array) -> Any:
        y, vjp = jax.vjp(lambda params, x: moe(params, x, segments, config)[0], params, x)
        return y, vjp(g)

    tx, tg = torch.from_dlpack(x).clone().requires_grad_(), torch.from_dlpack(g)

    def theirs(block: Any) -> Any:
        block.zero_grad(set_to_none=True)
        tx.grad = None
        y = block(tx)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(tg)
        return y

    settings = Qwen3VLMoeTextConfig(
        hidden_size=hidden, moe_intermediate_size=width, num_experts=experts,
        num_experts_per_tok=config.num_experts_per_tok, norm_topk_prob=config.norm_topk_prob,
    )  # fmt: skip
    settings._experts_implementation = "grouped_mm"
    block = Qwen3VLMoeTextSparseMoeBlock(settings).to(getattr(torch, dtype))
    values = dict(block.named_parameters())
    with torch.no_grad():
        values["gate.weight"].copy_(torch.from_dlpack(params["router"]).T)
        values["experts.gate_up_proj"].copy_(torch.from_dlpack(params["gate_up"]).mT)
        values["experts.down_proj"].copy_(torch.from_dlpack(params["down"]).mT)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: jax.block_until_ready(ours(params, x, g)),
        "transformers": partial(theirs, block),
    }
    difference = np.asarray(ours(params, x, g)[0], np.float32) - theirs(block).detach().float().numpy()
    error = float(np.median(np.abs(difference)) / np.asarray(g, np.float32).std())
    assert error < 0.05, f"the layers differ by {error:.1e}"
    seconds = seconds_of(calls, repetitions)
    of_layer = seconds["transformers"] / seconds["ours"]
    return {"layer": name, "tokens": tokens, "dtype": dtype, "seconds": seconds, "of_layer": of_layer}


def _table(result: dict[str, Any]) -> str:
    lines = [f"memory {result['bandwidth'] / 1e9:.1f} GB/s, {result['threads']} threads, {result['isa']}; milliseconds"]
    if result["products"]:
        forms = ("ours", "torch dense", "torch grouped_mm", "jax loop", "jax batched", "jax ragged_dot")
        lines.append(f"{'K':>5}{'N':>6}{'G':>5}{'rows':>7}" + "".join(f"{form:>18}" for form in forms)
                     + f"{'of floor':>10}{'over jax':>10}{'over torch':>12}")  # fmt: skip
    for row in result["products"]:
        times = "".join(f"{row['seconds'][f] * 1e3:>18.2f}" if f in row["seconds"] else f"{'-':>18}" for f in forms)
        lines.append(f"{row['k']:>5}{row['n']:>6}{row['groups']:>5}{row['rows']:>7}{times}{row['of_floor']:>10.2f}"
                     f"{row['of_jax']:>10.2f}{row['of_torch_grouped']:>12.2f}")  # fmt: skip
    for row in result["layers"]:
        times = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in row["seconds"].items())
        lines.append(
            f"layer {row['layer']}, {row['tokens']} tokens, {row['dtype']}: {times}; {row['of_layer']:.2f} times"
        )
    return "\n".join([*lines, *(f"missed: {miss}" for miss in result["missed"])])


def missed(result: dict[str, Any]) -> list[str]:
    """The bars that a result does not reach, in words."""
    found = []
    for row in result["products"]:
        name = f"K {row['k']} N {row['n']} groups {row['groups']} rows {row['rows']}"
        if row["of_floor"] > BARS["of_floor"]:
            found.append(f"{name}: {row['of_floor']:.2f} of the floor, more than {BARS['of_floor']}")
        for key in ("of_jax", "of_torch_grouped"):
            if row[key] < BARS[key]:
                found.append(f"{name}: {key} {row[key]:.2f}, less than {BARS[key]}")
    for row in result["layers"]:
        if row["of_layer"] < BARS["of_layer"]:
            found.append(f"layer {row['layer']} {row['dtype']}: {row['of_layer']:.2f}, less than {BARS['of_layer']}")
    return found


def main(argv: Sequence[str]) -> None:
    """Measures and prints; exits with 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="mindjax bench grouped_matmul", description=__doc__)
    parser.add_argument("--groups", default=",".join(map(str, GROUPS)), help="default: %(default)s")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="default: %(default)s")
    parser.add_argument("--layers", default=",".join(LAYERS), help="of %(default)s; empty for none")
    parser.add_argument("--tokens", type=int, default=512, help="of a layer (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    import kernels_cuda

    keep_freed_memory()  # as the commands do; torch allocates from the same heap
    isa, threads = kernels_cuda.status()["isa"], len(os.sched_getaffinity(0))
    if isa is None:
        raise SystemExit(kernels_cuda.status()["message"])
    memory = bandwidth(threads, arguments.repetitions)
    numbers = {name: [int(x) for x in getattr(arguments, name).split(",") if x] for name in ("groups", "rows")}
    result: dict[str, Any] = {"bandwidth": memory, "threads": threads, "isa": isa}
    result["products"] = [
        product(k, n, groups, rows, memory, arguments.repetitions)
        for k, n in SHAPES for groups in numbers["groups"] for rows in numbers["rows"]
    ]  # fmt: skip
    result["layers"] = [
        layer(name, arguments.tokens, dtype, arguments.repetitions)
        for name in arguments.layers.split(",") if name for dtype in ("float32", "bfloat16")
        if (name, dtype) != ("30b-a3b", "float32")  # 20 GiB
    ]  # fmt: skip
    result["missed"] = missed(result)
    print(json.dumps(result, indent=1) if arguments.json else _table(result))
    if result["missed"]:
        raise SystemExit(1)
