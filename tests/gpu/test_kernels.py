"""The CUDA kernels on a GPU: every contract of include/launch.h, at the shapes of Qwen3-30B-A3B, through both bindings.

`JAX_PLATFORMS=cuda python -m pytest -m gpu tests/gpu` needs jax, torch, numpy and pytest alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kernels_cuda import library, torch_binding  # noqa: E402
from tests.gpu.need import need_jax_gpu  # noqa: E402
from tests.kernels import contract  # noqa: E402

pytestmark = pytest.mark.gpu
BF16, F32 = torch.bfloat16, torch.float32
DEVICE = "cuda"


def routed(rows: int, groups: int, seed: int) -> list[int]:
    """Sizes of groups as a router gives them: some experts are liked more."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(rows, generator.dirichlet(np.full(groups, 2.0))).tolist()


CASES: dict[str, tuple[int, list[int]]] = {
    "edges": (450, [1, 63, 64, 65, 127, 129]),
    "no_rows_first_and_between": (4096, [0, 0, 1000, 0, 3095, 0]),
    "one_takes_all": (5000, [0, 5000, 0, 0]),
    "all_empty": (300, [0, 0, 0]),
    "rows_of_no_group": (4096, [100, 200, 301]),
    "decode": (512, routed(512, 128, 0)),
    "experts": (32768, routed(32768, 128, 1)),
}
SHAPES = [(2048, 1536), (768, 2048), (2048, 768), (136, 264)]
by_case = pytest.mark.parametrize("case", CASES)
by_shape = pytest.mark.parametrize(("k", "n"), SHAPES)


@pytest.fixture(params=["torch", "jax"])
def api(request: pytest.FixtureRequest) -> Any:
    if request.param == "torch":
        return torch_binding
    need_jax_gpu()
    from tests.gpu import jax_api

    return jax_api


@by_case
@by_shape
def test_rows_by_matrices(api: Any, k: int, n: int, case: str) -> None:
    rows, sizes = CASES[case]
    for name in ("gmm", "gmm_t"):
        for out_dtype in (BF16, F32):
            contract.check_gmm(api, rows, k, n, sizes, DEVICE, name=name, out_dtype=out_dtype)


@by_case
@by_shape
def test_few_rows(k: int, n: int, case: str) -> None:
    rows, sizes = CASES[case]
    contract.check_gmm(torch_binding, rows, k, n, sizes, DEVICE, name="gmm_decode")


@by_case
@by_shape
def test_matrices_from_rows(api: Any, k: int, n: int, case: str) -> None:
    rows, sizes = CASES[case]
    contract.check_tgmm(api, rows, k, n, sizes, DEVICE)
    contract.check_tgmm(api, rows, k, n, sizes, DEVICE, accumulate=True)


@by_case
@by_shape
def test_quantised_products(api: Any, k: int, n: int, case: str) -> None:
    rows, sizes = CASES[case]
    k = -(-k // 16) * 16
    for out_dtype in (BF16, F32):
        contract.check_gmm_fp8(api, rows, k, n, sizes, DEVICE, out_dtype=out_dtype)
        contract.check_gmm_s8(api, rows, k, n, sizes, DEVICE, out_dtype=out_dtype)


def test_many_rows() -> None:
    """131,072 rows of 128 experts, as in a training step of 16,384 tokens."""
    sizes = routed(131072, 128, 2)
    contract.check_gmm(torch_binding, 131072, 2048, 1536, sizes, DEVICE)
    contract.check_gmm(torch_binding, 131072, 768, 2048, sizes, DEVICE, name="gmm_t")
    contract.check_tgmm(torch_binding, 131072, 2048, 768, sizes, DEVICE)


@pytest.mark.parametrize("seed", range(5))
def test_random_sizes(seed: int) -> None:
    """Any rows, any sizes, any multiple of 8."""
    random = np.random.default_rng(seed)
    groups, k, n = int(random.integers(1, 40)), *(8 * random.integers(1, 120, 2)).tolist()
    sizes = random.integers(0, 300, groups).tolist()
    rows = sum(sizes) + int(random.integers(0, 100))
    for name in ("gmm", "gmm_t"):
        contract.check_gmm(torch_binding, rows, k, n, sizes, DEVICE, name=name, out_dtype=F32)
    contract.check_tgmm(torch_binding, rows, k, n, sizes, DEVICE, out_dtype=F32)
    contract.check_gmm_fp8(torch_binding, rows, 2 * k, n, sizes, DEVICE, out_dtype=F32)


@pytest.mark.parametrize("offset", [0, 5, 60])
def test_some_of_the_experts(api: Any, offset: int) -> None:
    sizes = routed(4096, 64, 3)
    contract.check_gmm(api, 4096, 768, 2048, sizes, DEVICE, offset=offset, groups=4)
    contract.check_gmm(api, 4096, 768, 2048, sizes, DEVICE, name="gmm_t", offset=offset, groups=4)
    contract.check_tgmm(api, 4096, 768, 2048, sizes, DEVICE, offset=offset, groups=4)
    contract.check_gmm_fp8(api, 4096, 768, 2048, sizes, DEVICE, offset=offset, groups=4)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_shapes_that_the_copy_engine_cannot_address(api: Any, dtype: torch.dtype) -> None:
    sizes = [5, 0, 66, 10, 300]
    for name in ("gmm", "gmm_t"):
        contract.check_gmm(api, 400, 137, 71, sizes, DEVICE, name=name, dtype=dtype)
    contract.check_tgmm(api, 400, 137, 71, sizes, DEVICE, dtype=dtype)
    contract.check_gmm_fp8(api, 400, 137, 71, sizes, DEVICE)
    contract.check_gmm_s8(api, 400, 137, 71, sizes, DEVICE)


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize(("k", "dtype"), [(2048, BF16), (2048, F32), (768, BF16), (200, BF16), (131, F32)])
def test_quantize(api: Any, k: int, dtype: torch.dtype, index: bool) -> None:
    contract.check_quantize(api, 700, k, DEVICE, dtype, index=index)


@pytest.mark.parametrize(("k", "dtype"), [(2048, BF16), (2048, F32), (37, BF16)])
def test_permute_and_unpermute(api: Any, k: int, dtype: torch.dtype) -> None:
    contract.check_rows(api, 1021, 8, k, DEVICE, dtype)


@pytest.mark.parametrize(("width", "dtype"), [(768, BF16), (768, F32), (37, BF16)])
def test_swiglu(api: Any, width: int, dtype: torch.dtype) -> None:
    contract.check_swiglu(api, 4001, width, DEVICE, dtype)


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what the function launches, and its outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # modules load before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph, out


def test_a_graph_replays_with_changed_sizes() -> None:
    """One graph of all products; the sizes it reads change between replays, down to none and up to all."""
    rows, k, n, groups = 2000, 768, 2048, 16
    x, w = (contract.random(*shape, dtype=BF16, device=DEVICE) for shape in ((rows, k), (groups, k, n)))
    g = contract.random(rows, n, dtype=BF16, device=DEVICE)
    w8 = contract.random(groups, n, k, dtype=F32, device=DEVICE).to(torch.float8_e4m3fn)
    w8_scales = torch.rand(groups, n // 128, k // 128, device=DEVICE) + 0.5
    sizes = contract.sizes_of([0] * groups, DEVICE)

    def everything() -> Any:
        values, scales = torch_binding.quantize_e4m3(x)
        return (
            torch_binding.gmm(x, w, sizes),
            torch_binding.gmm_t(g, w, sizes),
            torch_binding.tgmm(x, g, sizes, groups),
            torch_binding.gmm_fp8(values, scales, w8, w8_scales, sizes),
            torch_binding.gmm_decode(x, w, sizes),
        )

    graph, outputs = captured(everything)
    for chosen in ([0] * groups, routed(rows, groups, 4), [0, rows] + [0] * 14, routed(1500, groups, 5)):
        sizes.copy_(contract.sizes_of(chosen, DEVICE))
        x.copy_(contract.random(rows, k, dtype=BF16, device=DEVICE))
        for out in outputs:
            out.fill_(float("nan"))
        graph.replay()
        replayed = [out.clone() for out in outputs]
        for out, again in zip(replayed, everything(), strict=True):
            assert torch.equal(out, again)
        spans = contract.rows_between(chosen, 0, groups)
        contract.compare(replayed[0], contract.product(x, w, spans), what=f"replay of gmm, sizes {chosen}")
        contract.compare(replayed[1], contract.product(g, w.transpose(1, 2), spans), what=f"replay of gmm_t {chosen}")


def test_jax_compiles_once_for_all_sizes() -> None:
    """Sizes are data: one executable, with calls enough for XLA to record as a graph, and the bits of torch's."""
    need_jax_gpu()
    import jax

    from kernels_cuda import jax_binding
    from tests.gpu.jax_api import to_jax, to_torch

    def chain(ops: Any, x: Any, w: Any, sizes: Any) -> Any:
        for _ in range(4):
            x = ops.gmm_t(ops.gmm(x, w, sizes), w, sizes)
        return x

    step = jax.jit(lambda x, w, s: chain(jax_binding, x, w, s))
    x, w = (
        contract.random(2000, 768, dtype=BF16, device=DEVICE),
        contract.random(8, 768, 512, dtype=BF16, device=DEVICE),
    )
    w /= 32  # the chain neither grows nor fades
    for seed in range(6):
        chosen = contract.sizes_of(routed(2000 - 200 * seed, 8, seed), DEVICE)
        out = to_torch(step(to_jax(x), to_jax(w), to_jax(chosen)))
        assert torch.equal(out, chain(torch_binding, x, w, chosen))
        assert out.norm() > 0
    assert step._cache_size() == 1


def test_gradients_of_the_jax_operator() -> None:
    """mindjax.ops.grouped_matmul on the GPU against its own definition, gradients too."""
    need_jax_gpu()
    import jax
    import jax.numpy as jnp

    from mindjax.ops.grouped_matmul import grouped_matmul

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (700, 256), jnp.bfloat16)
    w = jax.random.normal(keys[1], (4, 256, 384), jnp.bfloat16)
    cotangent = jax.random.normal(keys[2], (700, 384), jnp.bfloat16)
    sizes = jnp.array([100, 0, 417, 60], jnp.int32)
    found = {}
    for implementation in ("cuda", "reference"):
        out, gradients = jax.vjp(lambda x, w, i=implementation: grouped_matmul(x, w, sizes, implementation=i), x, w)
        found[implementation] = (out, *gradients(cotangent))
    for ours, theirs in zip(found["cuda"], found["reference"], strict=True):
        difference = np.linalg.norm(np.float32(ours) - np.float32(theirs)) / np.linalg.norm(np.float32(theirs))
        assert difference < 2 * contract.BF16_ERROR


def test_one_pass_agrees_with_torchs_grouped_product() -> None:
    """An implementation that shares nothing with ours."""
    sizes = routed(8192, 32, 6)
    x = contract.random(8192, 2048, dtype=BF16, device=DEVICE)
    w = contract.random(32, 2048, 1536, dtype=BF16, device=DEVICE)
    offsets = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device=DEVICE)
    theirs = torch._grouped_mm(x, w, offs=offsets)
    ours = torch_binding.gmm(x, w, contract.sizes_of(sizes, DEVICE))
    assert ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item() < contract.BF16_ERROR


def test_cutlass_agrees() -> None:
    """The products by CUTLASS hold the same contract, in bfloat16."""
    if not hasattr(library.load("cuda").handle, "mjk_ffi_gmm_cutlass"):
        pytest.skip("CUTLASS is not built: MINDJAX_CUTLASS names the folder of its headers")
    need_jax_gpu()
    from tests.gpu import jax_api

    for case in CASES:
        rows, sizes = CASES[case]
        for name in ("gmm", "gmm_t"):
            contract.check_gmm(jax_api.Cutlass, rows, 768, 2048, sizes, DEVICE, name=name)
        contract.check_tgmm(jax_api.Cutlass, rows, 768, 2048, sizes, DEVICE)
