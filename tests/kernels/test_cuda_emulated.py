"""The CUDA kernels' own sources on an emulated GPU (kernels_cuda/cuda/emulate): results, masks, order, every contract.

The same checks run on a GPU in tests/gpu. What they leave to it: how the hardware reads the descriptors that the
emulation reads by the PTX ISA's tables, and fences between proxies.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from kernels_cuda import checks, library, torch_binding  # noqa: E402
from tests.kernels import contract  # noqa: E402

BF16, F32 = torch.bfloat16, torch.float32
NEEDED = {"nvcc": library.nvcc(), "cmake": shutil.which("cmake"), "g++": shutil.which("g++")}
MISSING = [name for name, path in NEEDED.items() if path is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: the CUDA headers come with nvcc")

# Rows, sizes: every boundary of a tile, groups without rows, one group with all of them, rows of no group.
CASES = {
    "edges": (450, [1, 63, 64, 65, 127, 129]),
    "no_rows_first_and_between": (270, [0, 0, 130, 0, 129, 0]),
    "one_takes_all": (300, [0, 300, 0]),
    "all_empty": (40, [0, 0, 0]),
    "rows_of_no_group": (200, [3, 70]),
}
by_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module", autouse=True)
def emulation() -> Iterator[None]:
    """torch_binding's CPU tensors go to the emulated CUDA library."""
    path, _ = checks.build("emulated")
    handle = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    handle.mjk_last_error.restype = ctypes.c_char_p
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_binding, "_handle", lambda backend: handle)
        patch.setattr(torch_binding, "_stream", lambda device: None)
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@by_case
@pytest.mark.parametrize(("name", "out_dtype"), [("gmm", BF16), ("gmm", F32), ("gmm_t", BF16), ("gmm_decode", BF16)])
def test_rows_by_matrices(name: str, out_dtype: torch.dtype, case: str) -> None:
    rows, sizes = CASES[case]
    k, n = (136, 264) if name != "gmm_t" else (264, 136)  # more than one tile and more than one stage, none full
    contract.check_gmm(torch_binding, rows, k, n, sizes, "cpu", name=name, out_dtype=out_dtype)


@pytest.mark.parametrize("name", ["gmm", "gmm_t"])
def test_a_ring_that_goes_round(name: str) -> None:
    """Several tiles of more stages than the ring holds: phases, and stages that are released in time."""
    contract.check_gmm(torch_binding, 200, 400, 400, [150, 10, 40], "cpu", name=name)


@by_case
def test_matrices_from_rows(case: str) -> None:
    rows, sizes = CASES[case]
    contract.check_tgmm(torch_binding, rows, 136, 264, sizes, "cpu")
    contract.check_tgmm(torch_binding, rows, 136, 264, sizes, "cpu", accumulate=True)


def test_matrices_from_more_rows_than_the_ring_holds() -> None:
    contract.check_tgmm(torch_binding, 500, 72, 72, [333, 0, 160], "cpu", out_dtype=F32)


@by_case
@pytest.mark.parametrize("out_dtype", [BF16, F32])
def test_quantised_products(case: str, out_dtype: torch.dtype) -> None:
    rows, sizes = CASES[case]
    contract.check_gmm_fp8(torch_binding, rows, 272, 264, sizes, "cpu", out_dtype=out_dtype)
    contract.check_gmm_s8(torch_binding, rows, 272, 264, sizes, "cpu", out_dtype=out_dtype)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_some_of_the_groups(offset: int) -> None:
    sizes = [40, 7, 0, 66, 80]
    for name in ("gmm", "gmm_t"):
        contract.check_gmm(torch_binding, 200, 72, 72, sizes, "cpu", name=name, offset=offset, groups=2)
    contract.check_tgmm(torch_binding, 200, 72, 72, sizes, "cpu", offset=offset, groups=2)
    contract.check_gmm_fp8(torch_binding, 200, 144, 72, sizes, "cpu", offset=offset, groups=2)
    contract.check_gmm_s8(torch_binding, 200, 144, 72, sizes, "cpu", offset=offset, groups=2)


def test_more_groups_than_a_warp_has_lanes() -> None:
    sizes = [g * 5 % 4 for g in range(70)]
    contract.check_gmm(torch_binding, 120, 72, 72, sizes, "cpu", out_dtype=F32)
    contract.check_gmm(torch_binding, 120, 72, 72, sizes, "cpu", offset=33, groups=36, out_dtype=F32)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_shapes_that_the_copy_engine_cannot_address(dtype: torch.dtype) -> None:
    """Odd sizes, and float32, take the kernel without tensor cores."""
    for name in ("gmm", "gmm_t"):
        contract.check_gmm(torch_binding, 90, 37, 71, [5, 0, 66, 10], "cpu", name=name, dtype=dtype)
    contract.check_tgmm(torch_binding, 90, 37, 71, [5, 0, 66, 10], "cpu", dtype=dtype)
    contract.check_gmm_fp8(torch_binding, 90, 137, 71, [5, 0, 66, 10], "cpu")
    contract.check_gmm_s8(torch_binding, 90, 137, 71, [5, 0, 66, 10], "cpu")


def test_a_sum_past_the_rows_stays_inside_the_arrays() -> None:
    """Sizes that sum to more than there are rows are a caller's mistake; memory past the arrays is not touched."""
    x, w = torch.randn(20, 72).to(BF16), torch.randn(2, 72, 72).to(BF16)
    out = torch_binding.gmm(x, w, contract.sizes_of([15, 2_000_000_000], "cpu"))
    contract.compare(out, contract.product(x, w, [(0, 15), (15, 20)]), what="a sum past the rows")


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize(("k", "dtype"), [(256, BF16), (256, F32), (200, BF16), (131, F32)])
def test_quantize(k: int, dtype: torch.dtype, index: bool) -> None:
    contract.check_quantize(torch_binding, 60, k, "cpu", dtype, index=index)


@pytest.mark.parametrize(("k", "dtype"), [(2048, BF16), (264, F32), (37, BF16)])
def test_permute_and_unpermute(k: int, dtype: torch.dtype) -> None:
    contract.check_rows(torch_binding, 21, 4, k, "cpu", dtype)


@pytest.mark.parametrize(("width", "dtype"), [(264, BF16), (264, F32), (37, BF16)])
def test_swiglu(width: int, dtype: torch.dtype) -> None:
    contract.check_swiglu(torch_binding, 19, width, "cpu", dtype)


def test_what_does_not_fit_is_refused() -> None:
    x, w = torch.zeros(4, 8, dtype=BF16), torch.zeros(2, 8, 8, dtype=BF16)
    with pytest.raises(ValueError, match=r"group_offset 2 and 2 groups exceed the 3"):
        torch_binding.gmm(x, w, contract.sizes_of([1, 1, 1], "cpu"), 2)
    with pytest.raises(RuntimeError, match="at most 1024"):
        torch_binding.gmm(x, torch.zeros(1025, 8, 8, dtype=BF16), contract.sizes_of([0] * 1025, "cpu"))
