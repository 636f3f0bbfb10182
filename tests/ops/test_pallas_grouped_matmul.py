"""The TPU's grouped products: interpreted here against float64, and compiled ahead of time for real TPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindjax.ops import pallas_grouped_matmul
from mindjax.ops.grouped_matmul import grouped_matmul
from mindjax.ops.pallas_grouped_matmul import gmm, tgmm

ROOT = Path(__file__).resolve().parents[2]
LIBTPU = Path(sys.prefix) / "libtpu"  # where .ci/setup puts it

CASES = {
    "mixed": ([3, 0, 5, 1], 9),
    "leading empty": ([0, 0, 4, 2], 6),
    "all empty": ([0, 0, 0], 8),
    "one takes all": ([0, 40, 0], 40),
    "tail": ([5, 2, 3, 0], 170),
    "odd sizes": ([1, 63, 64, 65, 0, 127, 129], 460),
    "no rows": ([0, 0], 0),
}


def operands(sizes: list[int], rows: int, k: int, n: int, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """x, w, cotangent, sizes; rows past the last group are NaN."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(rows, k)), rng.normal(size=(rows, n))
    x[sum(sizes) :] = np.nan
    g[sum(sizes) :] = np.nan
    w = rng.normal(size=(len(sizes), k, n))
    return *(jnp.asarray(a, dtype) for a in (x, w, g)), jnp.asarray(sizes, jnp.int32)


def expected(x: jax.Array, w: jax.Array, g: jax.Array, sizes: jax.Array) -> tuple[np.ndarray, ...]:
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    out, dx, dw = np.zeros(g.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for group, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + size)
        out[rows], dx[rows], dw[group] = x[rows] @ w[group], g[rows] @ w[group].T, x[rows].T @ g[rows]
        start += size
    return out, dx, dw


@jax.jit
def products(x: jax.Array, w: jax.Array, g: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
    return gmm(x, w, sizes, transposed=False), gmm(g, w, sizes, transposed=True), tgmm(x, g, sizes)


def assert_close(ours: tuple[jax.Array, ...], reference: tuple[np.ndarray, ...], dtype: jnp.dtype) -> None:
    gate = {"float32": 1e-6, "bfloat16": 3e-3}[jnp.dtype(dtype).name]
    for a, b in zip(ours, reference, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        a = np.asarray(a, np.float64)
        assert np.linalg.norm(a - b) <= gate * np.linalg.norm(b)
        assert not a[b == 0].any()  # empty groups and rows past the last are zero, not small


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str) -> None:
    sizes, rows = CASES[name]
    arrays = operands(sizes, rows, 12, 20, jnp.float32)
    assert_close(products(*arrays), expected(*arrays), jnp.float32)


def test_gradients_of_the_op() -> None:
    x, w, g, sizes = operands([5, 0, 33, 2], 50, 12, 20, jnp.float32)

    @jax.jit
    def run(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        out, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="pallas"), x, w)
        return out, *vjp(g)

    assert_close(run(x, w, g), expected(x, w, g, sizes), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dimensions_that_no_tile_divides(dtype: jnp.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of rows, inputs and outputs, the last of each cut off."""
    monkeypatch.setattr(pallas_grouped_matmul, "_TILE_BYTES", 2**17)
    monkeypatch.setattr(pallas_grouped_matmul, "_fit", lambda size, limit: min(size, 128))
    arrays = operands([130, 0, 70, 3, 300], 560, 200, 300, dtype)
    products.clear_cache()
    assert_close(products(*arrays), expected(*arrays), dtype)
    products.clear_cache()


def test_sizes_are_data() -> None:
    products.clear_cache()
    for sizes in ([4, 4], [0, 8], [8, 0], [1, 2]):
        arrays = operands(sizes, 8, 12, 20, jnp.float32)
        assert_close(products(*arrays), expected(*arrays), jnp.float32)
    assert products._cache_size() == 1


# Compiles for one TPU without having one. Prints, per product: FLOPs by XLA's count, in which a kernel counts as
# the sum over rows of their own product; and the HLO.
COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from mindjax.ops.pallas_grouped_matmul import gmm, tgmm

topology, shapes = sys.argv[1], json.loads(sys.argv[2])
sharding = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])
def array(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
for rows, k, n, groups, dtype in shapes:
    x, g = array(rows, k, dtype=dtype), array(rows, n, dtype=dtype)
    w, sizes = array(groups, k, n, dtype=dtype), array(groups, dtype=jnp.int32)
    for name, function, operands in (
        ("gmm", lambda x, w, s: gmm(x, w, s, transposed=False), (x, w, sizes)),
        ("gmm transposed", lambda g, w, s: gmm(g, w, s, transposed=True), (g, w, sizes)),
        ("tgmm", tgmm, (x, g, sizes)),
    ):
        compiled = jax.jit(function).lower(*operands).compile()
        print(json.dumps([name, [rows, k, n, groups, dtype], compiled.cost_analysis()["flops"], compiled.as_text()]))
"""
MODEL = [(4096, 2048, 1536, 128), (65536, 768, 2048, 128)]  # Qwen3-VL-30B-A3B: rows, K, N, groups
EVERY = [*MODEL, (512, 2048, 1536, 128), (131072, 2048, 1536, 8), (131072, 768, 2048, 8), (8192, 4096, 12288, 16),
         (4600, 1200, 2000, 7)]  # fmt: skip


def compile_for(topology: str, shapes: list[tuple[int, int, int, int]], dtypes: list[str]) -> None:
    cases = [[*shape, dtype] for shape in shapes for dtype in dtypes]
    assert LIBTPU.is_dir() or importlib.util.find_spec("libtpu"), f"no TPU compiler in {LIBTPU}; run .ci/setup test"
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, topology, json.dumps(cases)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",  # no queries of a cloud's metadata server, which answers nobody here
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a plan may be compiling
            "PYTHONPATH": f"{ROOT}:{LIBTPU}",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 3 * len(cases)
    for name, (rows, k, n, groups, dtype), flops, hlo in lines:
        where = f"{topology} {name} {(rows, k, n, groups, dtype)}"
        assert abs(flops / (2 * rows * k * n) - 1) < 0.1, where
        # All the work is in the one kernel: no product outside it, over all groups or otherwise.
        assert hlo.count('custom_call_target="tpu_custom_call"') == 1, where
        assert " dot(" not in hlo and " convolution(" not in hlo, where


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_tpu(topology: str) -> None:
    compile_for(topology, MODEL[:1], ["bfloat16", "float32"])


@pytest.mark.prove
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_every_shape_compiles_for_tpu(topology: str) -> None:
    compile_for(topology, EVERY, ["bfloat16", "float32"])
