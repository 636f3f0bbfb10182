"""The table of recompute against what JAX really keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.models import catalog, qwen3_vl
from mindjax.plan.cost import Job
from mindjax.plan.recompute import as_text, savings
from mindjax.types import Batch
from sharding.layout import Layout
from sharding.remat import NAMES

ROWS, LENGTH = 2, 64
MODEL = catalog.CATALOG["tiny"]


def text_batch(rows: int, length: int) -> Batch:
    zeros = np.zeros((rows, length), np.int32)
    return Batch(zeros, np.zeros((rows, length, 3), np.int32), zeros + 1, zeros.astype(np.float32), zeros - 1)


def kept(remat: Any) -> int:
    """Bytes of what the backward pass of a forward pass holds, weights included."""
    batch = text_batch(ROWS, LENGTH)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bfloat16), qwen3_vl.abstract_params(MODEL))
    _, pull = jax.vjp(lambda params: qwen3_vl.forward(params, MODEL, batch, remat=remat).hidden, params)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pull))


def temporaries(remat: Any) -> int:
    """Bytes beside arguments and results of a compiled gradient."""
    batch, params = text_batch(8, 256), qwen3_vl.abstract_params(MODEL)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    gradient = jax.jit(jax.grad(lambda params: qwen3_vl.forward(params, MODEL, batch, remat=remat).hidden.sum()))
    return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes


def test_the_compiler_does_not_keep_what_few_layers_compute_again() -> None:
    """Without a loop between layers it would, finding that the two are the same: 98 MiB and not 34."""
    assert temporaries("full") < 0.5 * temporaries("none")


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_that_jax_keeps(name: str) -> None:
    row = next(row for row in savings(Job(MODEL, Layout(), ROWS, LENGTH)) if row.name == name)
    others = tuple(other for other in NAMES if other != name)
    assert row.bytes == kept(NAMES) - kept(others)


def test_the_table_adds_up() -> None:
    job = Job(catalog.CATALOG["qwen3-vl-30b-a3b"], Layout(fsdp=64), 256, 8192)
    *parts, everything = savings(job)
    assert sum(row.bytes for row in parts) == everything.bytes
    assert sum(row.flops for row in parts) == pytest.approx(everything.flops, rel=1e-6)
    assert len(as_text(job).splitlines()) == 2 + len(parts) + 1
    wider = savings(replace(job, length=16384))
    scores, products = (next(row for row in wider if row.name == name) for name in ("attention", "qkv"))
    assert scores.flops / products.flops > 1.9 * next(r.flops for r in parts if r.name == "attention") / next(
        r.flops for r in parts if r.name == "qkv"
    )
