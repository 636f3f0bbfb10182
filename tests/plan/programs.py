"""Small programs compiled for several devices, in a process of its own: `python -m tests.plan.programs TOPOLOGY`.

Prints one JSON line for each: its name, XLA's own count of FLOPs, and the text of the optimised program.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mindjax.plan.compile import devices_of
from mindjax.plan.hardware import Topology
from sharding.layout import Layout

P = PartitionSpec
LAYOUT = Layout(fsdp=2, sequence=2, tensor=2)
LAYERS, HIDDEN, INNER, ROWS, TOKENS = 6, 256, 512, 4, 128


def layer(x: jax.Array, gate: jax.Array, down: jax.Array) -> jax.Array:
    """What the model's layers do: gathers over fsdp, tokens over tensor, an exchange over sequence."""
    gate = lax.all_gather(gate, "fsdp", axis=0, tiled=True)
    down = lax.all_gather(down, "fsdp", axis=1, tiled=True)
    everything = lax.all_gather(x, "tensor", axis=1, tiled=True)
    inner = jnp.tanh(jnp.einsum("bth,hf->btf", everything, gate))
    y = lax.psum_scatter(jnp.einsum("btf,fh->bth", inner, down), "tensor", scatter_dimension=1, tiled=True)
    y = jnp.sin(lax.all_to_all(y, "sequence", split_axis=2, concat_axis=1, tiled=True))
    y = lax.all_to_all(y, "sequence", split_axis=1, concat_axis=2, tiled=True)
    return x + lax.ppermute(y, "sequence", [(0, 1), (1, 0)])


def scanned(gate: jax.Array, down: jax.Array, x: jax.Array) -> jax.Array:
    block = jax.checkpoint(lambda x, p: (layer(x, *p), None), prevent_cse=False)
    x, _ = lax.scan(block, x, (gate, down))
    return lax.psum(jnp.sum(x * x), ("fsdp", "sequence", "tensor"))


def gathered_at_once(gate: jax.Array, down: jax.Array, x: jax.Array) -> jax.Array:
    """The mistake: all layers are gathered before the loop."""
    gate = lax.all_gather(gate, "fsdp", axis=1, tiled=True)
    x, _ = lax.scan(lambda x, p: (x @ p, None), x, jnp.einsum("lhf,lfg->lhg", gate, gate.swapaxes(1, 2)))
    return jnp.sum(x) + jnp.sum(down)


def gathered_logits(gate: jax.Array, down: jax.Array, x: jax.Array) -> jax.Array:
    """The mistake: logits of all of the vocabulary on every device."""
    logits = lax.all_gather(x @ gate[0, :1].repeat(HIDDEN, 0), "tensor", axis=2, tiled=True)
    return jnp.sum(jnp.sin(logits)) + jnp.sum(down)


def products(gate: jax.Array, down: jax.Array, x: jax.Array) -> Any:
    """No loop, products alone, one of them batched."""
    return jnp.einsum("bth,hf->btf", x, gate[0, :1].repeat(HIDDEN, 0)), jnp.einsum("bth,bsh->bts", x, x), down


def nested(gate: jax.Array, down: jax.Array, x: jax.Array) -> Any:
    def inner(x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(jnp.einsum("bth,hg->btg", x, gate[0, :1].repeat(HIDDEN, 0)[:, :HIDDEN])), None

    return lax.scan(lambda x, _: (lax.scan(inner, x, None, length=3)[0], None), x, None, length=5)[0], down


FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (scanned, gathered_at_once, gathered_logits, products, nested)
}


def main(topology: str, *names: str) -> None:
    devices, _ = devices_of(Topology.parse(topology), tuple(LAYOUT.sizes.values()))
    mesh = LAYOUT.mesh(devices)
    gate, down = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")
    x = P("fsdp", ("sequence", "tensor"))
    shapes = (LAYERS, HIDDEN, INNER), (LAYERS, INNER, HIDDEN), (ROWS, TOKENS, HIDDEN)
    # Each in the type that its compiler leaves as it is: a CPU widens bfloat16, a TPU multiplies float32 as bfloat16.
    dtype = jnp.float32 if topology.startswith("cpu") else jnp.bfloat16
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, (gate, down, x), strict=True)
    ]
    for name in names or FUNCTIONS:
        run = jax.shard_map(
            partial(FUNCTIONS[name]), mesh=mesh, in_specs=(gate, down, x), out_specs=P(), check_vma=False
        )
        call = jax.value_and_grad(run, argnums=(0, 1)) if name == "scanned" else run
        compiled = jax.jit(call).lower(*arguments).compile()
        print(json.dumps([name, compiled.cost_analysis()["flops"], compiled.as_text()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
