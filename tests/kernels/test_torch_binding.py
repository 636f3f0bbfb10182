"""The torch operators on the CPU library: the contract, fake results, gradients, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernels_cuda import library, torch_binding  # noqa: E402
from tests.kernels import contract  # noqa: E402

BF16, F32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.skipif(library.load("cpu").handle is None, reason=library.load("cpu").problem)

ROWS, K, N, SIZES = 60, 24, 40, [7, 0, 30, 13]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs(*, gradients: bool = True) -> tuple[Any, Any, Any]:
    x = torch.randn(ROWS, K, requires_grad=gradients)
    w = torch.randn(len(SIZES), K, N, requires_grad=gradients)
    return x, w, contract.sizes_of(SIZES, "cpu")


def plain_product(x: Any, w: Any) -> Any:
    """The product by torch's own operators, for its autograd."""
    parts = [x[begin:end] @ w[g] for g, (begin, end) in enumerate(contract.rows_between(SIZES, 0, len(SIZES)))]
    return torch.cat([*parts, torch.zeros(ROWS - sum(SIZES), N, dtype=x.dtype)])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_contract_holds(dtype: torch.dtype) -> None:
    for rows, sizes in ((450, [1, 63, 64, 65, 127, 129]), (300, [0, 300, 0]), (200, [3, 70])):
        for name in ("gmm", "gmm_t"):
            contract.check_gmm(torch_binding, rows, 136, 264, sizes, "cpu", name=name, dtype=dtype)
        contract.check_tgmm(torch_binding, rows, 136, 264, sizes, "cpu", dtype=dtype)
        contract.check_tgmm(torch_binding, rows, 136, 264, sizes, "cpu", dtype=dtype, accumulate=True)
    contract.check_gmm(torch_binding, 200, 72, 72, [40, 7, 0, 66, 80], "cpu", offset=1, groups=2, dtype=dtype)
    contract.check_rows(torch_binding, 21, 4, 264, "cpu", dtype)
    contract.check_swiglu(torch_binding, 19, 264, "cpu", dtype)
    for index in (False, True):
        contract.check_quantize(torch_binding, 60, 200, "cpu", dtype, index=index)


def test_the_quantised_contract_holds() -> None:
    contract.check_gmm_fp8(torch_binding, 200, 272, 264, [3, 0, 70, 100], "cpu")
    contract.check_gmm_s8(torch_binding, 200, 272, 264, [3, 0, 70, 100], "cpu")
    contract.check_gmm(torch_binding, 90, 136, 264, [0, 1, 17, 40], "cpu", name="gmm_decode")


def test_opcheck() -> None:
    """torch's own test of a custom operator: schema, fake results, autograd registration, tracing."""
    x, w, sizes = inputs()
    g = torch.randn(ROWS, N, requires_grad=True)
    gate_up, scale = torch.randn(ROWS, 2 * K, requires_grad=True), torch.rand(ROWS, requires_grad=True)
    index = torch.randint(-1, ROWS, (ROWS, 2), dtype=torch.int32)
    values, scales = torch_binding.quantize_e4m3(x.detach(), None)
    w8 = w.detach().transpose(1, 2).contiguous()
    eights = (values, scales, w8.to(torch.float8_e4m3fn), torch.ones(len(SIZES), 1, 1), sizes)
    ints = (values.float().to(torch.int8), torch.ones(ROWS), w8.to(torch.int8), torch.ones(len(SIZES), N), sizes)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (torch_binding.gmm, (x, w, sizes)),
        (torch_binding.gmm, (x, w, sizes, 0, BF16)),
        (torch_binding.gmm_t, (g, w, sizes)),
        (torch_binding.tgmm, (x, g, sizes, len(SIZES))),
        (torch_binding.tgmm_into, (x.detach(), g.detach(), sizes, torch.zeros(len(SIZES), K, N))),
        (torch_binding.gmm_fp8, eights),
        (torch_binding.gmm_s8, ints),
        (torch_binding.quantize_e4m3, (x.detach(), index[:, 0].contiguous())),
        (torch_binding.permute, (x, index[:, 0].contiguous(), index)),
        (torch_binding.unpermute, (x, index, torch.rand(ROWS, 2, requires_grad=True))),
        (torch_binding.swiglu, (gate_up, scale)),
        (torch_binding.swiglu_grad, (gate_up.detach(), torch.randn(ROWS, K), scale.detach())),
    ]
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, arguments in calls:
        # torch's own schema test multiplies its inputs and outputs, which it cannot in float8.
        float8 = operator in (torch_binding.gmm_fp8, torch_binding.quantize_e4m3)
        torch.library.opcheck(operator, arguments, test_utils=every[1:] if float8 else every)


def test_gradients_of_the_product() -> None:
    x, w, sizes = inputs()
    cotangent = torch.randn(ROWS, N)
    torch_binding.gmm(x, w, sizes).backward(cotangent)
    expected = torch.autograd.grad(plain_product(x, w), (x, w), cotangent)
    for ours, theirs in zip((x.grad, w.grad), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert w.grad[1].abs().max() == 0  # the group without rows
    assert x.grad[sum(SIZES) :].abs().max() == 0  # the rows of no group


def test_gradients_of_the_gradients() -> None:
    """Each product's gradients are the other two, so second derivatives come with them."""
    x, w, sizes = inputs()
    directions = torch.randn_like(x), torch.randn_like(w)

    def curvature(out: Any) -> Any:
        first = torch.autograd.grad((out**3).sum(), (x, w), create_graph=True)
        along = sum((gradient * direction).sum() for gradient, direction in zip(first, directions, strict=True))
        return torch.autograd.grad(along, (x, w))

    for ours, theirs in zip(curvature(torch_binding.gmm(x, w, sizes)), curvature(plain_product(x, w)), strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_gradients_of_permute_unpermute_and_swiglu() -> None:
    tokens, choices = 10, 3
    x = torch.randn(tokens, K, requires_grad=True)
    order = torch.randperm(tokens * choices)
    index = (order // choices).to(torch.int32)
    inverse = torch.argsort(order).to(torch.int32).reshape(tokens, choices)  # where token t's choice j went
    weight = torch.rand(tokens, choices, requires_grad=True)
    gathered = torch_binding.permute(x, index, inverse)
    (torch_binding.unpermute(gathered.sin(), inverse, weight).cos()).sum().backward()
    ours = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    plain = (x[index.long()].sin()[inverse.long()] * weight[..., None]).sum(1)
    plain.cos().sum().backward()
    for a, b in zip(ours, (x.grad, weight.grad), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)

    gate_up, scale = torch.randn(9, 2 * K, requires_grad=True), torch.rand(9, requires_grad=True)
    torch_binding.swiglu(gate_up, scale).sin().sum().backward()
    ours = gate_up.grad.clone(), scale.grad.clone()
    gate_up.grad = scale.grad = None
    gate, up = gate_up.chunk(2, 1)
    (torch.nn.functional.silu(gate) * up * scale[:, None]).sin().sum().backward()
    for a, b in zip(ours, (gate_up.grad, scale.grad), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_break() -> None:
    x, w, sizes = inputs()
    compiled = torch.compile(lambda x, w, s: torch_binding.gmm(x, w, s).relu(), fullgraph=True, backend="aot_eager")
    compiled(x, w, sizes).sum().backward()
    gradient = x.grad.clone()
    x.grad = None
    torch_binding.gmm(x, w, sizes).relu().sum().backward()
    assert torch.equal(gradient, x.grad)


def test_mistakes_are_named() -> None:
    x, w, sizes = inputs(gradients=False)
    with pytest.raises(ValueError, match=r"x \[R, K\] and w \[G, K, N\], got \[60, 23\] float32"):
        torch_binding.gmm(x[:, 1:], w, sizes)
    with pytest.raises(ValueError, match=r"use \.to\(torch\.int32\)"):
        torch_binding.gmm(x, w, sizes.long())
    with pytest.raises(ValueError, match="one dtype"):
        torch_binding.gmm(x.to(BF16), w, sizes)
    with pytest.raises(ValueError, match="needs `inverse`"):
        torch_binding.permute(x.requires_grad_(), sizes).sum().backward()
