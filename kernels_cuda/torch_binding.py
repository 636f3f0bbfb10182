"""The kernels as torch operators, `torch.ops.mindjax.*`, for CPU and CUDA tensors, with gradients.

The C ABI through ctypes, so that no build is tied to a torch version. R rows, K inputs, N outputs, G groups; layouts
are those of include/launch.h. `group_sizes` is int32 on the tensors' device and may be longer than G: group g then has
`group_sizes[group_offset + g]` rows, and the rows of the others come out zero. Work goes to torch's current stream and
nothing waits for it, so that calls can be captured into a CUDA graph. CPU tensors use a pool of as many threads as
torch.

Every operator raises ValueError for shapes and dtypes that do not fit, RuntimeError where the library is missing or a
launch fails.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from kernels_cuda import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.int8: 3}  # mjk_dtype
FLOATS = (torch.float32, torch.bfloat16)
OK, INVALID_ARGUMENT = 0, 1  # mjk_status


class _Size(int):
    """An int64 argument; other ints are C's int."""


@functools.cache
def _pool(threads: int) -> int:
    create = _handle("cpu").mjk_pool_create
    create.restype, create.argtypes = ctypes.c_void_p, [ctypes.c_int32]
    return create(threads)


def _handle(backend: str) -> ctypes.CDLL:
    found = library.load(backend)
    if found.handle is None:
        raise RuntimeError(f"the kernels of {backend!r} are {found.problem}")
    return found.handle


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else _pool(torch.get_num_threads())


def _call(name: str, *arguments: Any) -> None:
    """Calls mjk_<name>(stream, *arguments): tensors become pointers, dtypes their number, None a null pointer."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    device = tensors[0].device
    _require(all(t.device == device for t in tensors), f"{name}: all tensors must be on {device}")
    handle = _handle(device.type)
    raw: list[Any] = []
    for argument in arguments:
        if argument is None:
            raw.append(ctypes.c_void_p())
        elif isinstance(argument, Tensor):
            assert argument.is_contiguous()
            raw.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, _Size):
            raw.append(ctypes.c_int64(argument))
        else:
            raw.append(ctypes.c_int(DTYPES.get(argument, argument)))
    function = getattr(handle, f"mjk_{name}")
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = function(ctypes.c_void_p(_stream(device)), *raw)
    else:
        status = function(ctypes.c_void_p(_stream(device)), *raw)
    if status != OK:
        message = f"{name}: {handle.mjk_last_error().decode()}"
        raise ValueError(message) if status == INVALID_ARGUMENT else RuntimeError(message)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _show(*tensors: Tensor) -> str:
    return ", ".join(f"{list(t.shape)} {t.dtype}".replace("torch.", "") for t in tensors)


def _sizes(group_sizes: Tensor, groups: int, offset: int) -> tuple[_Size, _Size, _Size]:
    _require(
        group_sizes.dtype == torch.int32 and group_sizes.ndim == 1,
        f"group_sizes must be int32 [G], got {_show(group_sizes)}; use .to(torch.int32)",
    )
    _require(
        0 <= offset <= group_sizes.shape[0] - groups,
        f"group_offset {offset} and {groups} groups exceed the {group_sizes.shape[0]} group sizes",
    )
    return _Size(groups), _Size(group_sizes.shape[0]), _Size(offset)


def _float_pair(name: str, a: Tensor, b: Tensor) -> None:
    _require(
        a.dtype in FLOATS and a.dtype == b.dtype,
        f"{name} takes two tensors of one dtype, float32 or bfloat16, got {_show(a, b)}",
    )


def _result_dtype(dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    dtype = default if dtype is None else dtype
    _require(dtype in FLOATS, f"the result must be float32 or bfloat16, not {dtype}")
    return dtype


# ---- the three products


def _gmm_result(
    x: Tensor, w: Tensor, group_sizes: Tensor, group_offset: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    fits = x.ndim == 2 and w.ndim == 3 and x.shape[1] == w.shape[1]
    _require(fits, f"gmm takes x [R, K] and w [G, K, N], got {_show(x, w)}")
    _float_pair("gmm", x, w)
    _sizes(group_sizes, w.shape[0], group_offset)
    return x.new_empty((x.shape[0], w.shape[2]), dtype=_result_dtype(dtype, x.dtype))


PRODUCT = "(Tensor x, Tensor w, Tensor group_sizes, int group_offset=0, ScalarType? dtype=None) -> Tensor"


@torch.library.custom_op("mindjax::gmm", mutates_args=(), schema=PRODUCT)
def gmm(x: Tensor, w: Tensor, group_sizes: Tensor, group_offset: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """x [R, K] by w [G, K, N], each group of rows by its own matrix: [R, N] in `dtype` (default: that of x)."""
    return _product("gmm", _gmm_result(x, w, group_sizes, group_offset, dtype), x, w, group_sizes, group_offset)


def _gmm_t_result(
    x: Tensor, w: Tensor, group_sizes: Tensor, group_offset: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    fits = x.ndim == 2 and w.ndim == 3 and x.shape[1] == w.shape[2]
    _require(fits, f"gmm_t takes x [R, N] and w [G, K, N], got {_show(x, w)}")
    _float_pair("gmm_t", x, w)
    _sizes(group_sizes, w.shape[0], group_offset)
    return x.new_empty((x.shape[0], w.shape[1]), dtype=_result_dtype(dtype, x.dtype))


@torch.library.custom_op("mindjax::gmm_t", mutates_args=(), schema=PRODUCT)
def gmm_t(x: Tensor, w: Tensor, group_sizes: Tensor, group_offset: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """x [R, N] by the transposed w [G, K, N]: [R, K], the gradient of `gmm`'s rows."""
    return _product("gmm_t", _gmm_t_result(x, w, group_sizes, group_offset, dtype), x, w, group_sizes, group_offset)


@torch.library.custom_op("mindjax::gmm_decode", mutates_args=(), schema=PRODUCT)
def gmm_decode(
    x: Tensor, w: Tensor, group_sizes: Tensor, group_offset: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """`gmm` in bfloat16 by the kernel for few rows, which reads each weight once; no gradient."""
    _require(x.dtype == torch.bfloat16, f"gmm_decode takes bfloat16, got {_show(x, w)}")
    return _product("gmm_decode", _gmm_result(x, w, group_sizes, group_offset, dtype), x, w, group_sizes, group_offset)


def _product(name: str, out: Tensor, x: Tensor, w: Tensor, group_sizes: Tensor, offset: int) -> Tensor:
    k, n = (_Size(size) for size in w.shape[1:])
    counts = _sizes(group_sizes, w.shape[0], offset)
    operands = (x.contiguous(), w.contiguous(), group_sizes.contiguous(), out)
    _call(name, x.dtype, out.dtype, _Size(x.shape[0]), k, n, *counts, *operands)
    return out


def _check_tgmm(x: Tensor, g: Tensor, group_sizes: Tensor, groups: int, offset: int) -> None:
    fits = x.ndim == 2 and g.ndim == 2 and x.shape[0] == g.shape[0]
    _require(fits, f"tgmm takes x [R, K] and g [R, N], got {_show(x, g)}")
    _float_pair("tgmm", x, g)
    _sizes(group_sizes, groups, offset)


def _tgmm_result(
    x: Tensor, g: Tensor, group_sizes: Tensor, groups: int, group_offset: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    _check_tgmm(x, g, group_sizes, groups, group_offset)
    return x.new_empty((groups, x.shape[1], g.shape[1]), dtype=_result_dtype(dtype, x.dtype))


@torch.library.custom_op(
    "mindjax::tgmm",
    mutates_args=(),
    schema="(Tensor x, Tensor g, Tensor group_sizes, int groups, int group_offset=0, ScalarType? dtype=None) -> Tensor",
)
def tgmm(
    x: Tensor, g: Tensor, group_sizes: Tensor, groups: int, group_offset: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """x [R, K] transposed by g [R, N] over each group's rows: [groups, K, N], the gradient of `gmm`'s matrices."""
    out = _tgmm_result(x, g, group_sizes, groups, group_offset, dtype)
    _launch_tgmm(x, g, group_sizes, group_offset, out, accumulate=0)
    return out


@torch.library.custom_op(
    "mindjax::tgmm_into",
    mutates_args=("into",),
    schema="(Tensor x, Tensor g, Tensor group_sizes, Tensor(a!) into, int group_offset=0) -> ()",
)
def tgmm_into(x: Tensor, g: Tensor, group_sizes: Tensor, into: Tensor, group_offset: int = 0) -> None:
    """Adds `tgmm` to `into` [G, K, N] float32, in place."""
    _check_tgmm(x, g, group_sizes, into.shape[0], group_offset)
    _require(
        into.dtype == torch.float32 and into.is_contiguous() and into.shape[1:] == (x.shape[1], g.shape[1]),
        f"into must be contiguous float32 [G, {x.shape[1]}, {g.shape[1]}], got {_show(into)}",
    )
    _launch_tgmm(x, g, group_sizes, group_offset, into, accumulate=1)


def _launch_tgmm(x: Tensor, g: Tensor, group_sizes: Tensor, offset: int, out: Tensor, *, accumulate: int) -> None:
    sizes = (_Size(x.shape[0]), _Size(x.shape[1]), _Size(g.shape[1]), *_sizes(group_sizes, out.shape[0], offset))
    _call("tgmm", x.dtype, out.dtype, accumulate, *sizes, x.contiguous(), g.contiguous(), group_sizes.contiguous(), out)


gmm.register_fake(_gmm_result)
gmm_t.register_fake(_gmm_t_result)
gmm_decode.register_fake(_gmm_result)
tgmm.register_fake(_tgmm_result)
tgmm_into.register_fake(lambda x, g, group_sizes, into, group_offset=0: None)


# Each product's gradients are the other two.


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.offset = inputs[4] if len(inputs) == 6 else inputs[3]  # tgmm has the number of groups before it


def _gmm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, sizes = ctx.saved_tensors
    grad = grad.to(x.dtype)
    d_x = gmm_t(grad, w, sizes, ctx.offset) if ctx.needs_input_grad[0] else None
    d_w = tgmm(x, grad, sizes, w.shape[0], ctx.offset) if ctx.needs_input_grad[1] else None
    return d_x, d_w, None, None, None


def _gmm_t_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, sizes = ctx.saved_tensors
    grad = grad.to(x.dtype)
    d_x = gmm(grad, w, sizes, ctx.offset) if ctx.needs_input_grad[0] else None
    d_w = tgmm(grad, x, sizes, w.shape[0], ctx.offset) if ctx.needs_input_grad[1] else None
    return d_x, d_w, None, None, None


def _tgmm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, g, sizes = ctx.saved_tensors
    grad = grad.to(x.dtype)
    d_x = gmm_t(g, grad, sizes, ctx.offset) if ctx.needs_input_grad[0] else None
    d_g = gmm(x, grad, sizes, ctx.offset) if ctx.needs_input_grad[1] else None
    return d_x, d_g, None, None, None, None


gmm.register_autograd(_gmm_backward, setup_context=_save_product)
gmm_t.register_autograd(_gmm_t_backward, setup_context=_save_product)
tgmm.register_autograd(_tgmm_backward, setup_context=_save_product)


# ---- quantised products; no gradient


def _blocks(size: int) -> int:
    return -(-size // 128)


def _gmm_fp8_result(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, group_sizes: Tensor, group_offset: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    fits = x.ndim == 2 and w.ndim == 3 and x.shape[1] == w.shape[2]
    fits = fits and x.dtype == w.dtype == torch.float8_e4m3fn
    fits = fits and tuple(x_scale.shape) == (x.shape[0], _blocks(x.shape[1])) and x_scale.dtype == torch.float32
    fits = fits and tuple(w_scale.shape) == (w.shape[0], _blocks(w.shape[1]), _blocks(w.shape[2]))
    _require(
        fits and w_scale.dtype == torch.float32,
        "gmm_fp8 takes float8_e4m3fn x [R, K] and w [G, N, K], float32 scales [R, K/128] and [G, N/128, K/128], got "
        + _show(x, x_scale, w, w_scale),
    )
    _sizes(group_sizes, w.shape[0], group_offset)
    return x.new_empty((x.shape[0], w.shape[1]), dtype=_result_dtype(dtype, torch.bfloat16))


QUANTIZED = (
    "(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor group_sizes, int group_offset=0, "
    "ScalarType dtype=bfloat16) -> Tensor"
)


@torch.library.custom_op("mindjax::gmm_fp8", mutates_args=(), schema=QUANTIZED)
def gmm_fp8(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, group_sizes: Tensor, group_offset: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """e4m3 x [R, K] with scales [R, K/128] by w [G, N, K] with scales [G, N/128, K/128]: [R, N]."""
    out = _gmm_fp8_result(x, x_scale, w, w_scale, group_sizes, group_offset, dtype)
    return _quantized("gmm_fp8", out, x, x_scale, w, w_scale, group_sizes, group_offset)


def _gmm_s8_result(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, group_sizes: Tensor, group_offset: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    fits = x.ndim == 2 and w.ndim == 3 and x.shape[1] == w.shape[2] and x.dtype == w.dtype == torch.int8
    fits = fits and tuple(x_scale.shape) == (x.shape[0],) and tuple(w_scale.shape) == tuple(w.shape[:2])
    _require(
        fits and x_scale.dtype == w_scale.dtype == torch.float32,
        "gmm_s8 takes int8 x [R, K] and w [G, N, K], float32 scales [R] and [G, N], got "
        + _show(x, x_scale, w, w_scale),
    )
    _sizes(group_sizes, w.shape[0], group_offset)
    return x.new_empty((x.shape[0], w.shape[1]), dtype=_result_dtype(dtype, torch.bfloat16))


@torch.library.custom_op("mindjax::gmm_s8", mutates_args=(), schema=QUANTIZED)
def gmm_s8(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, group_sizes: Tensor, group_offset: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """int8 x [R, K] with scales [R] by w [G, N, K] with scales [G, N]: [R, N]; the sum is an int32."""
    out = _gmm_s8_result(x, x_scale, w, w_scale, group_sizes, group_offset, dtype)
    return _quantized("gmm_s8", out, x, x_scale, w, w_scale, group_sizes, group_offset)


def _quantized(
    name: str, out: Tensor, x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, group_sizes: Tensor, offset: int
) -> Tensor:
    sizes = (_Size(x.shape[0]), _Size(x.shape[1]), _Size(w.shape[1]), *_sizes(group_sizes, w.shape[0], offset))
    operands = (x.contiguous(), x_scale.contiguous(), w.contiguous(), w_scale.contiguous(), group_sizes.contiguous())
    _call(name, out.dtype, *sizes, *operands, out)
    return out


gmm_fp8.register_fake(_gmm_fp8_result)
gmm_s8.register_fake(_gmm_s8_result)


# ---- rows


def _check_index(name: str, x: Tensor, index: Tensor, ndim: int) -> None:
    _require(
        x.ndim == 2 and x.dtype in FLOATS and index.dtype == torch.int32 and index.ndim == ndim,
        f"{name} takes x [R, K] float32 or bfloat16 and an int32 index of rank {ndim}, got {_show(x, index)}",
    )


def _quantize_e4m3_result(x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _require(x.ndim == 2 and x.dtype in FLOATS, f"quantize_e4m3 takes float32 or bfloat16 [R, K], got {_show(x)}")
    if index is not None:
        _check_index("quantize_e4m3", x, index, 1)
    rows, k = x.shape[0] if index is None else index.shape[0], x.shape[1]
    scales = x.new_empty((rows, _blocks(k)), dtype=torch.float32)
    return x.new_empty((rows, k), dtype=torch.float8_e4m3fn), scales


@torch.library.custom_op(
    "mindjax::quantize_e4m3", mutates_args=(), schema="(Tensor x, Tensor? index=None) -> (Tensor, Tensor)"
)
def quantize_e4m3(x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows `index` [M] int32 (default: all) of x [R, K] as e4m3 [M, K] and float32 scales [M, K/128]; no gradient.

    The scale of 1 x 128 is max |x| / 448, 1 for zeros; a negative index gives zeros with scale 1.
    """
    out, scales = _quantize_e4m3_result(x, index)
    sizes = (_Size(x.shape[0]), _Size(out.shape[0]), _Size(x.shape[1]))
    _call("quantize_e4m3", x.dtype, *sizes, x.contiguous(), None if index is None else index.contiguous(), out, scales)
    return out, scales


def _permute_result(x: Tensor, index: Tensor, inverse: Tensor | None = None) -> Tensor:
    _check_index("permute", x, index, 1)
    return x.new_empty((index.shape[0], x.shape[1]))


@torch.library.custom_op(
    "mindjax::permute", mutates_args=(), schema="(Tensor x, Tensor index, Tensor? inverse=None) -> Tensor"
)
def permute(x: Tensor, index: Tensor, inverse: Tensor | None = None) -> Tensor:
    """Rows `index` [M] int32 of x [R, K]: [M, K]; zeros where the index is negative.

    `inverse` [R, C] int32, where each row of x went (-1: nowhere), makes the gradient a gather; it needs it.
    """
    out = _permute_result(x, index)
    sizes = (_Size(x.shape[0]), _Size(out.shape[0]), _Size(x.shape[1]))
    _call("permute", x.dtype, *sizes, x.contiguous(), index.contiguous(), out)
    return out


def _unpermute_result(x: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    _check_index("unpermute", x, index, 2)
    _require(
        weight is None or (weight.dtype == torch.float32 and weight.shape == index.shape),
        f"unpermute takes a float32 weight of the index's shape {list(index.shape)}",
    )
    return x.new_empty((index.shape[0], x.shape[1]))


@torch.library.custom_op(
    "mindjax::unpermute", mutates_args=(), schema="(Tensor x, Tensor index, Tensor? weight=None) -> Tensor"
)
def unpermute(x: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """The sum over j of weight [T, C] float32 (default: 1) times row index [T, C] int32 of x [R, K]: [T, K]."""
    out = _unpermute_result(x, index, weight)
    sizes = (_Size(x.shape[0]), _Size(index.shape[0]), _Size(index.shape[1]), _Size(x.shape[1]))
    weights = None if weight is None else weight.contiguous()
    _call("unpermute", x.dtype, *sizes, x.contiguous(), index.contiguous(), weights, out)
    return out


def _swiglu_result(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
    _require(
        gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0 and gate_up.dtype in FLOATS,
        f"swiglu takes float32 or bfloat16 gate_up [R, 2 I], got {_show(gate_up)}",
    )
    _require(
        scale is None or (scale.dtype == torch.float32 and tuple(scale.shape) == (gate_up.shape[0],)),
        f"swiglu takes a float32 scale [{gate_up.shape[0]}]",
    )
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@torch.library.custom_op("mindjax::swiglu", mutates_args=(), schema="(Tensor gate_up, Tensor? scale=None) -> Tensor")
def swiglu(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
    """silu(gate) times up of gate_up [R, 2 I] (gate first), times scale [R] float32 where given: [R, I]."""
    out = _swiglu_result(gate_up, scale)
    scales = None if scale is None else scale.contiguous()
    _call("swiglu", gate_up.dtype, _Size(out.shape[0]), _Size(out.shape[1]), gate_up.contiguous(), scales, out)
    return out


def _swiglu_grad_result(gate_up: Tensor, d_out: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out = _swiglu_result(gate_up, scale)
    _require(
        d_out.shape == out.shape and d_out.dtype == out.dtype,
        f"swiglu_grad takes d_out like swiglu's result {_show(out)}, got {_show(d_out)}",
    )
    return torch.empty_like(gate_up), gate_up.new_empty((0 if scale is None else scale.shape[0],), dtype=torch.float32)


@torch.library.custom_op(
    "mindjax::swiglu_grad",
    mutates_args=(),
    schema="(Tensor gate_up, Tensor d_out, Tensor? scale=None) -> (Tensor, Tensor)",
)
def swiglu_grad(gate_up: Tensor, d_out: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` for d_out [R, I]: of gate_up [R, 2 I], and of scale [R] (no elements where not given)."""
    gate_up = gate_up.contiguous()
    d_gate_up, d_scale = _swiglu_grad_result(gate_up, d_out, scale)
    operands = (gate_up, None if scale is None else scale.contiguous(), d_out.contiguous(), d_gate_up)
    sizes = (_Size(d_out.shape[0]), _Size(d_out.shape[1]))
    _call("swiglu_grad", gate_up.dtype, *sizes, *operands, None if scale is None else d_scale)
    return d_gate_up, d_scale


quantize_e4m3.register_fake(_quantize_e4m3_result)
permute.register_fake(_permute_result)
unpermute.register_fake(_unpermute_result)
swiglu.register_fake(_swiglu_result)
swiglu_grad.register_fake(_swiglu_grad_result)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _, _, inverse = ctx.saved_tensors
    _require(inverse is not None, "the gradient of permute needs `inverse` [R, C], where each row of x went")
    return unpermute(grad, inverse), None, None


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, index, weight = ctx.saved_tensors
    there = index >= 0
    rows = torch.where(there, index, 0).long()
    d_x = d_weight = None
    if ctx.needs_input_grad[0]:
        share = there.float() if weight is None else torch.where(there, weight, 0)
        parts = grad.float()[:, None] * share[..., None]
        d_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        d_x = d_x.index_add(0, rows.flatten(), parts.flatten(0, 1)).to(x.dtype)
    if weight is not None and ctx.needs_input_grad[2]:
        products = torch.einsum("tk,tck->tc", grad.float(), x[rows].float())
        d_weight = torch.where(there, products, 0)
    return d_x, None, d_weight


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gate_up, scale = ctx.saved_tensors
    d_gate_up, d_scale = swiglu_grad(gate_up, grad.contiguous(), scale)
    return d_gate_up, None if scale is None else d_scale


permute.register_autograd(_permute_backward, setup_context=_save)
unpermute.register_autograd(_unpermute_backward, setup_context=_save)
swiglu.register_autograd(_swiglu_backward, setup_context=_save)
