"""The contract of include/launch.h as checks over torch tensors, for every library and binding that claims it.

`api` has the functions of kernels_cuda.torch_binding. Inputs are fresh random numbers, results are compared with
float64 of the same inputs, outputs are NaN before a kernel writes them (`poisoned`), and so are the rows of no group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Of docs' numerics table: ||out - ref|| / ||ref|| and 1 - 2 <out, ref> / (<out, out> + <ref, ref>).
BF16_ERROR, BF16_DIFFERENCE = 3e-3, 1e-5
F32_ERROR = 5e-4
WORST_ROW = 2  # times the gate: no single row may hide in the norm of the others


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are NaN (or the largest integer) until something writes them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def sizes_of(sizes: Sequence[int], device: str) -> Tensor:
    return torch.tensor(sizes, dtype=torch.int32, device=device)


def rows_between(sizes: Sequence[int], first: int, count: int) -> list[tuple[int, int]]:
    """(first row, row after the last) of groups first .. first + count."""
    ends = [sum(sizes[: g + 1]) for g in range(len(sizes))]
    return [(ends[g] - sizes[g], ends[g]) for g in range(first, first + count)]


def compare(out: Tensor, reference: Tensor, *, what: str) -> None:
    """Within the gate of the dtype of `out`, and nothing NaN."""
    gate = BF16_ERROR if out.dtype == torch.bfloat16 else F32_ERROR
    assert out.isfinite().all(), f"{what}: {int((~out.isfinite()).sum())} elements are not finite"
    out = out.double()
    if reference.norm() == 0:
        assert out.abs().max() == 0 if out.numel() else True, f"{what}: not zero where nothing was added"
        return
    error = ((out - reference).norm() / reference.norm()).item()
    difference = 1 - 2 * (out * reference).sum().item() / ((out * out).sum() + (reference * reference).sum()).item()
    assert error < gate, f"{what}: error {error:.2e} over {gate:.0e}"
    assert difference < BF16_DIFFERENCE, f"{what}: difference {difference:.2e}"
    rows, expected = out.flatten(0, -2), reference.flatten(0, -2)
    norms = expected.norm(dim=1)
    assert (rows[norms == 0] == 0).all(), f"{what}: a row that should be zero is not"
    worst = ((rows - expected).norm(dim=1) / norms.clamp_min(norms.max() * 1e-3)).max().item()
    assert worst < WORST_ROW * gate, f"{what}: a row with error {worst:.2e}"


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32, device=device).to(dtype)


def rows_of_no_group(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """x with NaN in the rows past the last group."""
    x[sum(sizes) :] = float("nan")
    return x


def product(x: Tensor, w: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """The definition of gmm, in float64."""
    out = torch.zeros(x.shape[0], w.shape[2], dtype=torch.float64, device=x.device)
    for g, (begin, end) in enumerate(spans):
        out[begin:end] = x[begin:end].double() @ w[g].double()
    return out


def check_gmm(
    api: Any, rows: int, k: int, n: int, sizes: Sequence[int], device: str, *, name: str = "gmm", offset: int = 0,
    groups: int | None = None, dtype: torch.dtype = torch.bfloat16, out_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """gmm, gmm_t or gmm_decode: the result, zeros elsewhere, and the same bits again."""
    groups = len(sizes) - offset if groups is None else groups
    spans = rows_between(sizes, offset, groups)
    w = random(groups, k, n, dtype=dtype, device=device)
    x = rows_of_no_group(random(rows, n if name == "gmm_t" else k, dtype=dtype, device=device), sizes)
    group_sizes = sizes_of(sizes, device)
    with poisoned():
        out = getattr(api, name)(x, w, group_sizes, offset, out_dtype)
        again = getattr(api, name)(x, w, group_sizes, offset, out_dtype)
    what = f"{name} rows {rows} k {k} n {n} sizes {list(sizes)[:8]} offset {offset} {out.dtype}"
    compare(out, product(x, w.transpose(1, 2) if name == "gmm_t" else w, spans), what=what)
    assert torch.equal(out, again), f"{what}: a second run differs"
    outside = torch.ones(rows, dtype=torch.bool, device=device)
    for begin, end in spans:
        outside[begin:end] = False
    assert (out[outside] == 0).all(), f"{what}: rows of no group are not zero"


def check_tgmm(
    api: Any, rows: int, k: int, n: int, sizes: Sequence[int], device: str, *, offset: int = 0,
    groups: int | None = None, dtype: torch.dtype = torch.bfloat16, out_dtype: torch.dtype | None = None,
    accumulate: bool = False,
) -> None:  # fmt: skip
    """tgmm: the result, exact zeros for groups without rows, the same bits again, and adding to a buffer."""
    groups = len(sizes) - offset if groups is None else groups
    x = rows_of_no_group(random(rows, k, dtype=dtype, device=device), sizes)
    g = rows_of_no_group(random(rows, n, dtype=dtype, device=device), sizes)
    group_sizes = sizes_of(sizes, device)
    what = f"tgmm rows {rows} k {k} n {n} sizes {list(sizes)[:8]} offset {offset} accumulate {accumulate}"
    reference = torch.zeros(groups, k, n, dtype=torch.float64, device=device)
    spans = rows_between(sizes, offset, groups)
    for i, (begin, end) in enumerate(spans):
        reference[i] = x[begin:end].double().T @ g[begin:end].double()
    if accumulate:
        before = random(groups, k, n, dtype=torch.float32, device=device)
        out, again = before.clone(), before.clone()
        api.tgmm_into(x, g, group_sizes, out, offset)
        api.tgmm_into(x, g, group_sizes, again, offset)
        reference += before.double()
    else:
        with poisoned():
            out = api.tgmm(x, g, group_sizes, groups, offset, out_dtype)
            again = api.tgmm(x, g, group_sizes, groups, offset, out_dtype)
    compare(out, reference, what=what)
    assert torch.equal(out, again), f"{what}: a second run differs"
    for i, (begin, end) in enumerate(spans):
        if begin == end:
            untouched = before[i] if accumulate else torch.zeros_like(out[i])
            assert torch.equal(out[i], untouched), f"{what}: group {i} has no rows and a gradient"


def expand(values: Tensor, scales: Tensor, *block: int) -> Tensor:
    """Quantised values times their scales, in float64; one scale per block of the last dimensions."""
    wide = scales.double()
    for dim, size in zip(range(-len(block), 0), block, strict=True):
        wide = wide.repeat_interleave(size, dim).narrow(dim, 0, values.shape[dim])
    return values.double() * wide


def check_gmm_fp8(
    api: Any, rows: int, k: int, n: int, sizes: Sequence[int], device: str, *, offset: int = 0,
    groups: int | None = None, out_dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Against float64 of the same quantised inputs; scales differ by powers, so that a wrong one shows."""
    groups = len(sizes) - offset if groups is None else groups
    x = random(rows, k, dtype=torch.float32, device=device) * torch.exp2(torch.randn(rows, 1, device=device))
    values, scales = api.quantize_e4m3(x, None)
    w = (40 * torch.randn(groups, n, k, device=device)).clamp(-448, 448).to(torch.float8_e4m3fn)
    w_scales = torch.exp2(torch.randn(groups, -(-n // 128), -(-k // 128), device=device))
    spans = rows_between(sizes, offset, groups)
    past = slice(sum(sizes), None)
    values.view(torch.uint8)[past] = 0x7F  # NaN
    scales[past] = float("nan")
    with poisoned():
        out = api.gmm_fp8(values, scales, w, w_scales, sizes_of(sizes, device), offset, out_dtype)
    reference = product(expand(values, scales, 128), expand(w, w_scales, 128, 128).transpose(1, 2), spans)
    compare(out, reference, what=f"gmm_fp8 rows {rows} k {k} n {n} sizes {list(sizes)[:8]} {out_dtype}")


def check_gmm_s8(
    api: Any, rows: int, k: int, n: int, sizes: Sequence[int], device: str, *, offset: int = 0,
    groups: int | None = None, out_dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    groups = len(sizes) - offset if groups is None else groups
    x = torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=device)
    w = torch.randint(-127, 128, (groups, n, k), dtype=torch.int8, device=device)
    scales, w_scales = torch.rand(rows, device=device) + 0.5, torch.rand(groups, n, device=device) + 0.5
    scales[sum(sizes) :] = float("nan")
    with poisoned():
        out = api.gmm_s8(x, scales, w, w_scales, sizes_of(sizes, device), offset, out_dtype)
    spans = rows_between(sizes, offset, groups)
    reference = product(
        x.double() * scales.double()[:, None], expand(w, w_scales[..., None], 1, k).transpose(1, 2), spans
    )
    compare(out, reference, what=f"gmm_s8 rows {rows} k {k} n {n} sizes {list(sizes)[:8]} {out_dtype}")


def quantize_reference(x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition on the CPU: bytes by ml_dtypes, which knows nothing of these kernels, and scales by NumPy."""
    import ml_dtypes
    import numpy as np

    source = x.detach().float().cpu().numpy()
    if index is not None:
        rows = index.cpu().numpy()
        source = np.where((rows >= 0)[:, None], source[np.maximum(rows, 0)], np.float32(0))
    count, k = source.shape
    padded = np.zeros((count, -(-k // 128) * 128), np.float32)
    padded[:, :k] = source
    blocks = padded.reshape(count, -1, 128)
    whole, least = np.isfinite(blocks).all(-1, keepdims=True), np.finfo(np.float32).tiny
    blocks = np.where(np.abs(blocks) < least, np.copysign(np.float32(0), blocks), blocks)
    blocks = np.where(whole, blocks, np.float32(0))
    largest = np.abs(blocks).max(-1)
    scales = np.where(largest > 0, np.maximum(largest / np.float32(448), least), np.float32(1))
    values = np.clip(blocks / scales[..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    scales = np.where(whole[..., 0], scales, np.float32("nan"))
    values = values.view(np.uint8).reshape(count, -1)[:, :k]
    return torch.from_numpy(values.copy()), torch.from_numpy(scales)


def check_quantize(api: Any, rows: int, k: int, device: str, dtype: torch.dtype, *, index: bool) -> None:
    """Bytes and scales equal to the bit. Rows of every size from 1e-20 to 1e20, zeros, ties, what is too small for a
    scale of its own or to count at all, infinities and NaN among them."""
    x = random(rows, k, dtype=torch.float32, device=device) * torch.logspace(-20, 20, rows, device=device)[:, None]
    x[rows // 2] = 0
    x[-1] = torch.arange(k, device=device) % 64 * 7 / 16.0  # scale 63 / 1024: quotients that fall between two values
    x[1:4] = random(3, k, dtype=torch.float32, device=device) * torch.tensor([[1e-36], [3e-38], [1e-40]], device=device)
    x[4:7, k // 2] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=device)
    x = x.to(dtype)
    chosen = torch.randint(-1, rows, (rows + 3,), dtype=torch.int32, device=device) if index else None
    with poisoned():
        values, scales = api.quantize_e4m3(x, chosen)
    expected, expected_scales = quantize_reference(x, chosen)
    assert torch.equal(scales.cpu().nan_to_num(nan=-1), expected_scales.nan_to_num(nan=-1)), "scales differ"
    wrong = (values.view(torch.uint8).cpu() != expected).sum().item()
    assert wrong == 0, f"{wrong} of {expected.numel()} bytes differ"


def check_rows(api: Any, tokens: int, choices: int, k: int, device: str, dtype: torch.dtype) -> None:
    """permute as a gather, unpermute as a weighted sum in the order of the choices; absent rows on both sides."""
    rows = tokens * choices
    x = random(tokens, k, dtype=dtype, device=device)
    order = torch.randperm(rows, device=device)
    index = (order // choices).to(torch.int32)
    index[::7] = -1
    with poisoned():
        gathered = api.permute(x, index)
    absent = (index < 0)[:, None]
    assert torch.equal(gathered, torch.where(absent, 0, x[index.clamp_min(0).long()]))

    y = random(rows, k, dtype=dtype, device=device)
    back = torch.randperm(rows, device=device).to(torch.int32).reshape(tokens, choices)
    back[::5, 0] = -1
    y[0] = float("nan")
    back[back == 0] = -1  # the NaN row is nobody's choice
    for weight in (None, torch.rand(tokens, choices, device=device)):
        with poisoned():
            out = api.unpermute(y, back, weight)
        total = torch.zeros(tokens, k, dtype=torch.float64, device=device)
        for j in range(choices):
            part = y[back[:, j].clamp_min(0).long()].double() * (1 if weight is None else weight[:, j, None].double())
            total += torch.where((back[:, j] < 0)[:, None], 0, part)
        compare(out, total, what=f"unpermute {tokens} x {choices} x {k} {dtype} weight {weight is not None}")


def check_swiglu(api: Any, rows: int, width: int, device: str, dtype: torch.dtype) -> None:
    """Forward and gradients against torch's autograd in float64."""
    gate_up = random(rows, 2 * width, dtype=dtype, device=device)
    d_out = random(rows, width, dtype=dtype, device=device)
    for scale in (None, torch.rand(rows, device=device) + 0.5):
        wide = gate_up.double().requires_grad_()
        factor = torch.ones(rows, dtype=torch.float64, device=device) if scale is None else scale.double()
        factor.requires_grad_()
        gate, up = wide.chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up * factor[:, None]
        expected.backward(d_out.double())
        with poisoned():
            out = api.swiglu(gate_up, scale)
            d_gate_up, d_scale = api.swiglu_grad(gate_up, d_out, scale)
        what = f"swiglu {rows} x {width} {dtype} scale {scale is not None}"
        compare(out, expected.detach(), what=what)
        compare(d_gate_up, wide.grad, what=what + " gradient")
        if scale is not None:
            assert torch.allclose(d_scale.double(), factor.grad, rtol=1e-4, atol=1e-4), what + " gradient of the scale"
