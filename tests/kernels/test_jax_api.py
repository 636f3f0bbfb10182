"""The JAX binding on the CPU library, through the checks and the adapter of tests/gpu."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from kernels_cuda import library  # noqa: E402
from tests.gpu import jax_api  # noqa: E402
from tests.kernels import contract  # noqa: E402

pytestmark = pytest.mark.skipif(library.load("cpu").handle is None, reason=library.load("cpu").problem)
SIZES = [3, 0, 70, 100]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_products() -> None:
    for name in ("gmm", "gmm_t"):
        contract.check_gmm(jax_api, 200, 136, 264, SIZES, "cpu", name=name)
        contract.check_gmm(jax_api, 200, 136, 264, SIZES, "cpu", name=name, offset=1, groups=2, out_dtype=torch.float32)
    contract.check_tgmm(jax_api, 200, 136, 264, SIZES, "cpu")
    contract.check_tgmm(jax_api, 200, 136, 264, SIZES, "cpu", accumulate=True)


def test_quantised_products() -> None:
    contract.check_gmm_fp8(jax_api, 200, 272, 264, SIZES, "cpu")
    contract.check_gmm_s8(jax_api, 200, 272, 264, SIZES, "cpu")


def test_rows() -> None:
    contract.check_rows(jax_api, 21, 4, 264, "cpu", torch.float32)
    contract.check_swiglu(jax_api, 19, 264, "cpu", torch.bfloat16)
    for index in (False, True):
        contract.check_quantize(jax_api, 60, 200, "cpu", torch.bfloat16, index=index)
