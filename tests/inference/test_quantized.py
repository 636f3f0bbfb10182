"""Weights of 8 bits: the products against float64, what is quantised, and what the sampler reports."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mindjax.data.packing import collate_prompts, size_of
from mindjax.data.render import append_completion
from mindjax.inference.quantized import FORMATS, Kind, quantize_params
from mindjax.inference.sampler import SamplingConfig, generate, prompt_shape, sampling_keys
from mindjax.models import qwen3_vl
from mindjax.ops import dispatch, grouped_matmul, matmul
from mindjax.ops.quantize import Quantized, quantize
from tests.inference.prompts import random_prompt
from tests.train import tiny

KINDS: tuple[Kind, ...] = ("int8", "fp8")


def rounded(x: np.ndarray, kind: Kind, block: tuple[int, int]) -> np.ndarray:
    """What value * scale of each block is, [rows, K], in float64."""
    out = np.empty(x.shape)
    for i in range(0, x.shape[0], block[0]):
        for j in range(0, x.shape[1], block[1]):
            part = x[i : i + block[0], j : j + block[1]].astype(np.float32)
            largest = np.float32(127 if kind == "int8" else 448)
            scale = np.abs(part).max() / largest or np.float32(1)
            values = np.rint(part / scale) if kind == "int8" else (part / scale).astype(ml_dtypes.float8_e4m3fn)
            out[i : i + block[0], j : j + block[1]] = values.astype(np.float64) * np.float64(scale)
    return out


def expected(x: np.ndarray, w: np.ndarray, kind: Kind) -> np.ndarray:
    """x [R, K] by w [K, N]."""
    k = x.shape[1]
    rows = rounded(x, kind, (1, k if kind == "int8" else 128))
    return rows @ rounded(w.T, kind, (1, k) if kind == "int8" else (128, 128)).T


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_products_against_float64(kind: Kind, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges of blocks, outliers, a row of zeros, several leading dimensions; experts without rows, rows without one."""
    if not kernels:
        for module in (matmul, grouped_matmul):
            monkeypatch.setattr(module, "on_cpu_and_cuda", lambda kernel, default, *operands: default(*operands))
    else:
        assert dispatch.jax_fused.usable(), "the kernels are what this is about"
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(12, 200)).astype(np.float32), rng.normal(size=(3, 200, 150)).astype(np.float32)
    x[3], x[5, 7], w[:, 11, 13] = 0, 40, 9
    weights = jax.jit(quantize, static_argnums=1)(jnp.asarray(w.swapaxes(-1, -2)), FORMATS[kind])
    for dtype, bound in ((jnp.float32, 2e-6), (jnp.bfloat16, 4e-3))[: 1 + kernels]:

        @jax.jit
        def products(x: Any, rows: Any, w: Any, sizes: Any) -> Any:
            one = jax.tree.map(lambda leaf: leaf[0], w)
            return matmul.matmul(x.reshape(2, 6, 200), one), grouped_matmul.grouped_matmul(rows, w, sizes)

        given = x.astype(dtype)
        seen, rows = given.astype(np.float32), given.copy()
        rows[9:] = np.nan
        dense, grouped = products(given, rows, weights, np.asarray([4, 0, 5], np.int32))
        assert dense.dtype == grouped.dtype == dtype and dense.shape == (2, 6, 150)
        close(dense.reshape(12, 150), expected(seen, w[0], kind), bound)
        close(grouped[:4], expected(seen[:4], w[0], kind), bound)
        close(grouped[4:9], expected(seen[4:9], w[2], kind), bound)
        assert not np.asarray(grouped[9:], np.float32).any()


def close(out: Any, truth: np.ndarray, bound: float) -> None:
    assert np.linalg.norm(np.asarray(out, np.float64) - truth) <= bound * np.linalg.norm(truth)


@pytest.mark.parametrize(("kind", "moe"), [("int8", True), ("fp8", False)])
def test_only_the_products_of_layers_are_quantised(kind: Kind, moe: bool) -> None:
    config = tiny.moe_model() if moe else tiny.model()
    params = tiny.init(config)
    quantised = quantize_params(params, config, kind)
    leaves = jax.tree_util.tree_leaves_with_path(quantised, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    names = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    products = ["attn.q", "attn.k", "attn.v", "attn.o"]
    products += ["moe.gate_up", "moe.down"] if moe else ["mlp.gate", "mlp.up", "mlp.down"]
    assert {name for name, leaf in names.items() if isinstance(leaf, Quantized)} == {
        f"text.layers.{name}" for name in products
    }
    before = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in before:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        now = names[name]
        if not isinstance(now, Quantized):
            assert now is leaf, name
            continue
        sizes = now.values.nbytes / leaf.nbytes, now.scales.nbytes / leaf.nbytes
        assert sizes[0] == 1 / 4 and sizes[1] <= 1 / 16
        numbers = np.asarray(now.values).astype(np.float64) * np.asarray(now.scales, np.float64)
        for matrix, original in zip(matrices(numbers), matrices(np.asarray(leaf)), strict=True):
            block = (1, original.shape[0]) if kind == "int8" else (128, 128)
            np.testing.assert_array_equal(matrix, rounded(original.T, kind, block))
    with pytest.raises(ValueError, match="int8 or fp8, not 'int4'"):
        quantize_params(params, config, "int4")  # type: ignore[arg-type]


def matrices(stack: np.ndarray) -> np.ndarray:
    return stack.reshape(-1, *stack.shape[-2:])


@partial(jax.jit, static_argnums=1)
def logprobs(params: Any, config: Any, batch: Any) -> Any:
    return qwen3_vl.token_logprobs(params, config, batch, temperature=0.8).logp


@pytest.mark.parametrize(("kind", "moe"), [("int8", True), ("fp8", False)])
def test_the_sampler_reports_what_it_drew_from(kind: Kind, moe: bool) -> None:
    """Its log-probabilities are the quantised model's, which differ from the trainer's by a small divergence."""
    config = tiny.moe_model() if moe else tiny.model()
    params, rng = tiny.init(config), np.random.default_rng(0)
    quantised = quantize_params(params, config, kind)
    prompts = [random_prompt(config, pieces, rng) for pieces in ([9], [("image", 2, 4), 5], [14])]
    shape = prompt_shape([size_of(prompt) for prompt in prompts], 3, config)
    sampling = SamplingConfig(max_new_tokens=40, temperature=0.8, num_samples=4)
    keys = sampling_keys(0, 0, range(3), 4)
    answers = generate(quantised, config, prompts, sampling=sampling, keys=keys, shape=shape)
    own, trainer = [], []
    for sample in range(4):
        full = [append_completion(prompt, row[sample].token_ids) for prompt, row in zip(prompts, answers, strict=True)]
        batch = collate_prompts(full)
        for tree, differences in ((quantised, own), (params, trainer)):
            logp = np.asarray(logprobs(tree, config, batch))
            for i, (sequence, row) in enumerate(zip(full, answers, strict=True)):
                end = len(sequence.tokens)
                differences.append(logp[i, end - 40 : end] - np.asarray(row[sample].logprobs))
    # Where a rounding falls the other way, by the order of a sum before it, one token moves by some 1e-3.
    assert np.quantile(np.abs(own), 0.95) < 1e-5 and np.abs(own).max() < 0.05
    kl = (np.expm1(trainer) - trainer).mean()
    assert 1e-5 < kl < {"int8": 4e-4, "fp8": 4e-3}[kind]
    # An activation's scale is its token's: other rows of the batch change nothing.
    shuffled = [2, 0]
    keys = sampling_keys(0, 0, shuffled, 4)
    some = generate(quantised, config, [prompts[i] for i in shuffled], sampling=sampling, keys=keys, shape=shape)
    assert [[c.token_ids for c in row] for row in some] == [[c.token_ids for c in answers[i]] for i in shuffled]


def test_float8_layers_are_not_widened_on_a_cpu() -> None:
    """XLA would hold a stack that a loop reads as float16."""
    config = replace(tiny.model(), tie_word_embeddings=True)
    quantised = quantize_params(tiny.init(config), config, "fp8")
    batch = collate_prompts([random_prompt(config, [9], np.random.default_rng(0))])
    program = jax.jit(lambda p, b: qwen3_vl.forward(p, config, b).hidden).lower(quantised, batch).compile().as_text()
    stacks = {f"[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(quantised) if leaf.dtype.itemsize == 1}
    assert stacks and all(f"u8{stack}" in program for stack in stacks)
    assert not any(f"f16{stack}" in program or f"f32{stack}" in program for stack in stacks)
