"""The bfloat16 scan over layers against `lax.scan`, which it must equal to the bit."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mindjax.ops.scan import FEW_LAYERS, loops, scan_layers, unstack

LAYERS, ROWS, H = 5, 6, 8


def problem(dtype: Any, count: int = LAYERS) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    layers = {
        "w": jax.random.normal(keys[0], (count, H, H)).astype(dtype) / 3,
        "scale": jax.random.normal(keys[1], (count, H)).astype(dtype),
    }
    x, shift = (jax.random.normal(key, (ROWS, H)).astype(dtype) for key in keys[2:])
    return layers, x, shift


def run(scan: Any, remat: bool, mask: jax.Array) -> Any:
    def loss(layers: Any, x: jax.Array, shift: jax.Array) -> Any:
        def block(x: jax.Array, layer: Any) -> Any:
            p, index = layer
            hidden = checkpoint_name(jnp.tanh(x @ p["w"]), "hidden")
            x = x + jnp.where(mask[:, None], hidden * p["scale"][None], jnp.zeros((), x.dtype))
            x = lax.cond(index < 2, lambda x: x + shift, lambda x: x, x)
            return x, (hidden.astype(jnp.float32).sum(), hidden[0])

        if remat:
            policy = jax.checkpoint_policies.save_only_these_names("hidden")
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        x, (sums, rows) = scan(block, x, (layers, jnp.arange(len(layers["w"]))))
        return (x.astype(jnp.float32) ** 2).sum() + (sums**2).sum(), (x, rows)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_equals_lax_scan(dtype: Any, remat: bool) -> None:
    mask = jnp.arange(ROWS) % 3 > 0
    arguments = problem(dtype)
    ours, theirs = (run(scan, remat, mask)(*arguments) for scan in (scan_layers, lax.scan))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # XLA may fuse differently, which moves a rounding to bfloat16.
        assert np.linalg.norm(a - b) <= (2e-2 if dtype == jnp.bfloat16 else 1e-6) * np.linalg.norm(b)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_few_layers_without_a_loop(dtype: Any) -> None:
    mask, follow = jnp.arange(ROWS) % 3 > 0, partial(scan_layers, loop=False)
    arguments = problem(dtype)
    ours, theirs = (run(scan, False, mask)(*arguments) for scan in (follow, lax.scan))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= (2e-2 if dtype == jnp.bfloat16 else 1e-6) * np.linalg.norm(b)
    assert " while(" not in run(follow, False, mask).lower(*arguments).compile().as_text()
    assert " while(" in run(scan_layers, False, mask).lower(*arguments).compile().as_text()
    assert [loops(FEW_LAYERS, False), loops(FEW_LAYERS + 1, False), loops(1, True)] == [False, True, True]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_outputs_without_a_loop_have_gradients(dtype: Any) -> None:
    layers, x, _ = problem(dtype)

    def loss(scan: Any, layers: Any, x: jax.Array) -> jax.Array:
        x, out = scan(lambda x, p: (x @ p["w"], x * p["scale"][None]), x, layers)
        first, *_ = unstack(out)
        return sum(((y.astype(jnp.float32) ** 2).sum() for y in (out, first, x)), jnp.float32(0))

    scans = (partial(scan_layers, loop=False), lax.scan)
    ours, theirs = (jax.grad(partial(loss, scan), argnums=(0, 1))(layers, x) for scan in scans)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= (2e-2 if dtype == jnp.bfloat16 else 1e-6) * np.linalg.norm(b)


def test_no_stack_is_converted() -> None:
    """What the scan is for: no float32 copy of a stack of layers in the compiled program."""
    arguments = problem(jnp.bfloat16)
    text = run(scan_layers, True, jnp.ones(ROWS, bool)).lower(*arguments).compile().as_text()
    assert f"f32[{LAYERS},{H},{H}]" not in text and f"f32[{LAYERS},{ROWS},{H}]" not in text
    text = run(lax.scan, True, jnp.ones(ROWS, bool)).lower(*arguments).compile().as_text()
    assert f"f32[{LAYERS},{H},{H}]" in text  # else this file is no longer needed


def test_only_what_changes_is_stored_for_every_layer() -> None:
    """Neither parameters nor what the block closes over (the mask, the shift) get a stack of their own."""
    arguments = problem(jnp.bfloat16)
    text = run(scan_layers, True, jnp.ones(ROWS, bool)).lower(*arguments).as_text()
    loops = [line for line in text.splitlines() if "stablehlo.while" in line]
    assert len(loops) == 2
    types = re.findall(r"tensor<(\w+)>", text[text.index("stablehlo.while") :].split(" cond {")[0])
    stacks = sorted(kind for kind in types if kind.startswith(f"{LAYERS}x"))
    # In: parameters, indices. Out: sums, rows, and of what is kept the input of a layer and its `hidden`.
    expected = [f"{LAYERS}x{H}x{H}xui16", f"{LAYERS}x{H}xui16", f"{LAYERS}xi32"]
    expected += [f"{LAYERS}xf32", f"{LAYERS}x{H}xui16", *2 * [f"{LAYERS}x{ROWS}x{H}xui16"]]
    assert stacks == sorted(expected)
