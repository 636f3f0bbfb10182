"""The CPU library at every instruction set of this machine: the contract, the same bits on any number of threads, no
deadlock under XLA's pool, and nothing for the sanitizers or a guarded page to find."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor

from kernels_cuda import jax_binding, library
from mindjax.ops.grouped_matmul import grouped_matmul
from tests.kernels import contract

ROOT = Path(__file__).resolve().parent.parent.parent
ISAS = ("scalar", "avx2", "avx512f", "avx512_bf16", "amx_bf16")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
F32, BF16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.skipif(library.load("cpu").handle is None, reason=library.load("cpu").problem)


class Api:
    """The C ABI of one instruction set, with the functions of kernels_cuda.torch_binding."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.mjk_isa.restype = self.library.mjk_last_error.restype = ctypes.c_char_p
        self.library.mjk_pool_create.restype = ctypes.c_void_p
        self.pools: dict[int, int] = {}
        self.threads = 2

    def call(self, name: str, *arguments: Any) -> None:
        if self.threads not in self.pools:
            self.pools[self.threads] = self.library.mjk_pool_create(self.threads)
        converted = [
            ctypes.c_void_p(a.data_ptr() if a.numel() else None) if isinstance(a, Tensor)
            else ctypes.c_int32(DTYPES[a]) if isinstance(a, torch.dtype)
            else ctypes.c_int64(a) if isinstance(a, int) else a
            for a in arguments
        ]  # fmt: skip
        status = getattr(self.library, f"mjk_{name}")(ctypes.c_void_p(self.pools[self.threads]), *converted)
        if status:
            raise ValueError(self.library.mjk_last_error().decode())

    def _gmm(self, name: str, x: Tensor, w: Tensor, sizes: Tensor, offset: int, out_dtype: Any) -> Tensor:
        groups, k, n = w.shape
        out = torch.empty(len(x), k if name == "gmm_t" else n, dtype=out_dtype or x.dtype)
        self.call(name, x.dtype, out.dtype, len(x), k, n, groups, len(sizes), offset, x, w, sizes, out)
        return out

    def gmm(self, x: Tensor, w: Tensor, sizes: Tensor, offset: int = 0, out_dtype: Any = None) -> Tensor:
        return self._gmm("gmm", x, w, sizes, offset, out_dtype)

    def gmm_t(self, x: Tensor, w: Tensor, sizes: Tensor, offset: int = 0, out_dtype: Any = None) -> Tensor:
        return self._gmm("gmm_t", x, w, sizes, offset, out_dtype)

    def gmm_decode(self, x: Tensor, w: Tensor, sizes: Tensor, offset: int = 0, out_dtype: Any = None) -> Tensor:
        return self._gmm("gmm_decode", x, w, sizes, offset, out_dtype)

    def _tgmm(self, x: Tensor, g: Tensor, sizes: Tensor, out: Tensor, offset: int, accumulate: int) -> None:
        flag = ctypes.c_int32(accumulate)
        shape = (len(x), x.shape[1], g.shape[1], len(out), len(sizes), offset)
        self.call("tgmm", x.dtype, out.dtype, flag, *shape, x, g, sizes, out)

    def tgmm(self, x: Tensor, g: Tensor, sizes: Tensor, groups: int, offset: int = 0, out_dtype: Any = None) -> Tensor:
        out = torch.empty(groups, x.shape[1], g.shape[1], dtype=out_dtype or x.dtype)
        self._tgmm(x, g, sizes, out, offset, 0)
        return out

    def tgmm_into(self, x: Tensor, g: Tensor, sizes: Tensor, out: Tensor, offset: int = 0) -> None:
        self._tgmm(x, g, sizes, out, offset, 1)

    def _quantised(self, name: str, x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, sizes: Tensor, offset: int,
                   out_dtype: torch.dtype) -> Tensor:  # fmt: skip
        out = torch.empty(len(x), w.shape[1], dtype=out_dtype)
        shape = (len(x), x.shape[1], w.shape[1], len(w), len(sizes), offset)
        self.call(name, out_dtype, *shape, x, xs, w, ws, sizes, out)
        return out

    def gmm_fp8(self, *operands: Any) -> Tensor:
        return self._quantised("gmm_fp8", *operands)

    def gmm_s8(self, *operands: Any) -> Tensor:
        return self._quantised("gmm_s8", *operands)

    def quantize_e4m3(self, x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = len(x) if index is None else len(index)
        out = torch.empty(rows, x.shape[1], dtype=torch.uint8).view(torch.float8_e4m3fn)
        scales = torch.empty(rows, -(-x.shape[1] // 128))
        self.call("quantize_e4m3", x.dtype, len(x), rows, x.shape[1], x, index, out, scales)
        return out, scales

    def permute(self, x: Tensor, index: Tensor) -> Tensor:
        out = torch.empty(len(index), x.shape[1], dtype=x.dtype)
        self.call("permute", x.dtype, len(x), len(index), x.shape[1], x, index, out)
        return out

    def unpermute(self, x: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
        out = torch.empty(len(index), x.shape[1], dtype=x.dtype)
        self.call("unpermute", x.dtype, len(x), *index.shape, x.shape[1], x, index, weight, out)
        return out

    def swiglu(self, gate_up: Tensor, scale: Tensor | None) -> Tensor:
        out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype)
        self.call("swiglu", gate_up.dtype, *out.shape, gate_up, scale, out)
        return out

    def swiglu_grad(self, gate_up: Tensor, d_out: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        d_gate_up, d_scale = torch.empty_like(gate_up), torch.empty(len(gate_up))
        self.call("swiglu_grad", gate_up.dtype, *d_out.shape, gate_up, scale, d_out, d_gate_up,
                  None if scale is None else d_scale)  # fmt: skip
        return d_gate_up, d_scale


def at_isa(name: str, folder: Path) -> Api:
    """The library at one instruction set: a copy of the file, which chooses for itself when it is first called."""
    path = folder / f"{name}.so"
    shutil.copyfile(str(library.load("cpu").path), path)
    before = os.environ.get("MINDJAX_CPU_ISA")
    os.environ["MINDJAX_CPU_ISA"] = name
    try:
        api = Api(path)
        chosen = api.library.mjk_isa().decode()
    finally:
        del os.environ["MINDJAX_CPU_ISA"]
        if before is not None:
            os.environ["MINDJAX_CPU_ISA"] = before
    if chosen != name:
        pytest.skip(f"this processor has {chosen} and not {name}")
    return api


@pytest.fixture(scope="module", params=ISAS)
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    api = at_isa(request.param, tmp_path_factory.mktemp("isa"))
    yield api
    for pool in api.pools.values():
        api.library.mjk_pool_destroy(ctypes.c_void_p(pool))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


SIZES: dict[str, tuple[int, Sequence[int]]] = {  # rows, sizes
    "odd sizes": (449, [1, 63, 64, 65, 127, 129]),
    "leading empty": (60, [0, 0, 40, 20]),
    "all empty": (50, [0, 0, 0]),
    "one takes all": (300, [0, 300, 0]),
    "tail": (200, [3, 70, 16, 32]),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("case", SIZES)
def test_products(api: Api, case: str, dtype: torch.dtype) -> None:
    rows, sizes = SIZES[case]
    for k, n in ((33, 7), (136, 264), (128, 96), (1, 1)):
        for out_dtype in (F32, BF16):
            for name in ("gmm", "gmm_t", "gmm_decode"):
                contract.check_gmm(api, rows, k, n, sizes, "cpu", name=name, dtype=dtype, out_dtype=out_dtype)
            contract.check_tgmm(api, rows, k, n, sizes, "cpu", dtype=dtype, out_dtype=out_dtype)
        contract.check_tgmm(api, rows, k, n, sizes, "cpu", dtype=dtype, accumulate=True)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_some_of_the_groups(api: Api, dtype: torch.dtype) -> None:
    for name in ("gmm", "gmm_t"):
        contract.check_gmm(api, 200, 72, 80, [40, 7, 0, 66, 80], "cpu", name=name, offset=1, groups=3, dtype=dtype)
    contract.check_tgmm(api, 200, 72, 80, [40, 7, 0, 66, 80], "cpu", offset=1, groups=3, dtype=dtype)


def test_sizes_of_the_model(api: Api) -> None:
    """More of K and of the rows than is packed at a time, and the widths of the experts."""
    for k, n in ((2048, 1536), (768, 2048)):
        contract.check_gmm(api, 70, k, n, [37, 33], "cpu")
        contract.check_gmm(api, 70, k, n, [37, 33], "cpu", name="gmm_t")
        contract.check_tgmm(api, 70, k, n, [37, 33], "cpu")
    contract.check_gmm(api, 40, 2300, 40, [40], "cpu", dtype=F32, out_dtype=F32)
    contract.check_tgmm(api, 2300, 48, 40, [2300], "cpu", out_dtype=F32)


def test_results_larger_than_the_caches(api: Api) -> None:
    """They are stored past them, in whole lines where those are whole."""
    sizes = [5, 0, 9, 17, 0, 1, 2, 3]
    for n in (1056, 1060):
        contract.check_tgmm(api, sum(sizes), 2048, n, sizes, "cpu")
        contract.check_tgmm(api, sum(sizes), 1024, n, sizes, "cpu", dtype=F32, out_dtype=F32)


def test_float32_is_exact_to_a_few_roundings(api: Api) -> None:
    """Each sum within 2^-20 of the sum of its terms' sizes, over the exponents of numbers in training: where
    float32 is taken apart into bfloat16, a piece or a product of pieces left out is 2^-17 or more."""
    rows, k, n = 96, 512, 64
    x, w, g = (torch.randn(*s) * torch.exp2(torch.randint(-30, 30, s)) for s in ((rows, k), (1, k, n), (rows, n)))
    sizes = contract.sizes_of([rows], "cpu")
    products = {
        "gmm": (api.gmm(x, w, sizes), x, w[0]),
        "gmm_t": (api.gmm_t(g, w, sizes), g, w[0].T),
        "tgmm": (api.tgmm(x, g, sizes, 1)[0], x.T, g),
    }
    for name, (out, a, b) in products.items():
        error = (out.double() - a.double() @ b.double()).abs() / (a.double().abs() @ b.double().abs())
        assert error.max() < 2**-20, f"{name}: {error.max().item() * 2**24:.1f} x 2^-24"


def test_numbers_that_are_none_stay_so(api: Api) -> None:
    """A NaN in a row shows in all of that row and in no other; so does an infinity, as itself or as a NaN."""
    for bad in (float("nan"), float("inf"), -float("nan")):
        x, w = torch.randn(64, 40), torch.randn(1, 40, 33)
        x[5, 7] = bad
        out = api.gmm(x, w, contract.sizes_of([64], "cpu"))
        assert not out[5].isfinite().any()
        assert out[torch.arange(64) != 5].isfinite().all()
        # A row of an odd number of bfloat16 ends in the middle of a pair.
        g, w = torch.randn(64, 33, dtype=BF16), torch.randn(1, 40, 33, dtype=BF16)
        g[5, 0] = bad
        out = api.gmm_t(g, w, contract.sizes_of([64], "cpu"))
        assert not out[5].isfinite().any()
        assert out[torch.arange(64) != 5].isfinite().all()


def test_quantised(api: Api) -> None:
    few = (120, 192, 80, [1, 33, 0, 17, 64])  # whole tiles of int8
    for rows, k, n, sizes in ((200, 272, 264, [3, 0, 70, 100]), (9, 128, 128, [9]), (5, 1, 3, [2]), few):
        for out_dtype in (F32, BF16):
            contract.check_gmm_fp8(api, rows, k, n, sizes, "cpu", out_dtype=out_dtype)
            contract.check_gmm_s8(api, rows, k, n, sizes, "cpu", out_dtype=out_dtype)


def test_sums_of_int8_are_exact(api: Api) -> None:
    """127 x 127 x 4096 is beyond 2^24, where float32 stops counting: one less somewhere has to show."""
    k = 4096
    x, w = torch.full((1, k), 127, dtype=torch.int8), torch.full((1, 1, k), 127, dtype=torch.int8)
    x[0, 1000], w[0, 0, 1000] = 1, 3
    one = torch.ones(1)
    out = api.gmm_s8(x, one, w, one[None], contract.sizes_of([1], "cpu"), 0, F32)
    assert out.item() == np.float32(127 * 127 * (k - 1) + 3)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows(api: Api, dtype: torch.dtype) -> None:
    contract.check_rows(api, 21, 4, 264, "cpu", dtype)
    contract.check_rows(api, 3, 1, 7, "cpu", dtype)
    contract.check_swiglu(api, 19, 264, "cpu", dtype)
    contract.check_swiglu(api, 2, 5, "cpu", dtype)
    for index in (False, True):
        contract.check_quantize(api, 60, 200, "cpu", dtype, index=index)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_any_number_of_threads_gives_the_same_bits(api: Api, dtype: torch.dtype) -> None:
    sizes = contract.sizes_of([100, 0, 211, 1, 88], "cpu")
    x, g, w = torch.randn(400, 130).to(dtype), torch.randn(400, 260).to(dtype), torch.randn(5, 130, 260).to(dtype)
    seen = []
    for api.threads in (1, 2, 8, 2):
        seen.append((api.gmm(x, w, sizes), api.gmm_t(g, w, sizes), api.tgmm(x, g, sizes, 5, 0, F32)))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("k, n, sizes", [(131, 2048, [1, 15, 16, 17]), (133, 1100, [60, 0, 70, 49, 130, 5])])
def test_few_rows_are_the_same_bits_however_w_is_read(
    api: Api, k: int, n: int, sizes: Sequence[int], dtype: torch.dtype
) -> None:
    """All groups in one call, in blocks of fewer columns and in parts of other depths, or each group alone."""
    contract.check_gmm(api, sum(sizes), k, n, sizes, "cpu", dtype=dtype)
    x, w = torch.randn(sum(sizes), k).to(dtype), torch.full((len(sizes) + 2, k, n), torch.nan, dtype=dtype)
    w[1:-1] = torch.randn(len(sizes), k, n)
    w = w[1:-1]  # what lies beside it is not read into a sum
    alone = [
        api.gmm(part, w[i : i + 1], contract.sizes_of([len(part)], "cpu"))
        for i, part in enumerate(x.split(list(sizes)))
    ]
    for api.threads in (1, 2, 8):
        assert torch.equal(api.gmm(x, w, contract.sizes_of(sizes, "cpu")), torch.cat(alone))


def test_sizes_that_do_not_fit_are_named(api: Api) -> None:
    x, w = torch.randn(4, 3), torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match="the groups have 5 rows in all, x has 4"):
        api.gmm(x, w, contract.sizes_of([2, 3], "cpu"))
    with pytest.raises(ValueError, match="group 1 has -1 rows"):
        api.gmm(x, w, contract.sizes_of([2, -1], "cpu"))
    with pytest.raises(ValueError, match="2 groups from 1 exceed the 2 group sizes"):
        api.gmm(x, w, contract.sizes_of([2, 1], "cpu"), 1)


# ---- under JAX


def test_operands_that_do_not_fit_are_named() -> None:
    sizes = jnp.asarray([2, 1], jnp.int32)
    x, w = jnp.ones((4, 3)), jnp.ones((2, 3, 5))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"x \[4, 2\], w \[2, 3, 5\]"):
        jax_binding.gmm(x[:, :2], w, sizes).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="one dtype, float32 or bfloat16"):
        jax_binding.gmm(x.astype(jnp.bfloat16), w, sizes).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="7 rows in all, x has 4"):
        jax_binding.gmm(x, w, sizes + 2).block_until_ready()


def test_adding_to_a_buffer() -> None:
    x, g, sizes = jnp.ones((6, 3)), jnp.ones((6, 4)), jnp.asarray([2, 4], jnp.int32)
    into = jnp.full((2, 3, 4), 10.0)
    out = jax.jit(lambda into: jax_binding.tgmm(x, g, sizes, into=into))(into)
    assert (np.asarray(out) == np.asarray([12.0, 14.0])[:, None, None]).all() and (np.asarray(into) == 10).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_the_reference(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((90, 33), (4, 33, 40)))
    g, sizes = jnp.asarray(rng.normal(size=(90, 40)), dtype), jnp.asarray([40, 0, 17, 20], jnp.int32)

    def run(implementation: str) -> tuple[jax.Array, ...]:
        out, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return out, *vjp(g)

    for ours, reference in zip(run("cpu"), run("reference"), strict=True):
        difference = np.linalg.norm(np.asarray(ours - reference, np.float64))
        assert difference <= (1e-6 if dtype == jnp.float32 else 3e-3) * np.linalg.norm(np.asarray(reference, float))


def test_vmap_runs_the_calls_one_by_one() -> None:
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 20, 5), (2, 5, 6)))
    sizes = jnp.asarray([[3, 4], [0, 20], [7, 0]], jnp.int32)
    batched = jax.jit(jax.vmap(grouped_matmul, in_axes=(0, None, 0)))(x, w, sizes)
    for i in range(3):
        np.testing.assert_array_equal(batched[i], grouped_matmul(x[i], w, sizes[i]))


def test_no_deadlock_with_more_calls_than_threads() -> None:
    """Programs of independent products, started from many threads at once: every thread of XLA's pool is inside one."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 128)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(2, 128, 128)), jnp.float32)
    sizes = jnp.asarray([100, 156], jnp.int32)

    @jax.jit
    def program(x: jax.Array) -> jax.Array:
        def turn(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return sum(grouped_matmul(x * (i + 1), w, sizes) for i in range(8)) * 1e-3, None

        return jax.lax.scan(turn, x, None, length=20)[0]

    expected = np.asarray(program(x))
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(np.asarray(program(x))), daemon=True) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(results) == len(threads), "calls wait for each other"
    assert all((result == expected).all() for result in results)


# ---- what is compiled


def test_sanitizers_and_guarded_pages_find_nothing() -> None:
    """kernels_cuda/cpu/check.cc, built with AddressSanitizer and UndefinedBehaviorSanitizer, at every level."""
    build = ROOT / "build" / "sanitize"
    configure = ["cmake", "-S", str(ROOT / "kernels_cuda"), "-B", str(build), "-DMINDJAX_SANITIZE=ON"]
    for command in ([*configure, "-DMINDJAX_FFI_INCLUDE="], ["cmake", "--build", str(build), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    best = ISAS.index(library.load("cpu").handle.mjk_isa().decode())  # type: ignore[union-attr]
    for isa in ISAS[: best + 1]:
        environment = os.environ | {"MINDJAX_CPU_ISA": isa}
        done = subprocess.run(
            [str(build / "cpu" / "mindjax_cpu_check")], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert done.stdout.strip() == f"{isa}: 0 failures"
