"""The JAX binding under the signatures of the torch one, so that both go through the same checks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from kernels_cuda import jax_binding

DTYPES = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16}


def to_jax(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    if tensor.is_cuda:
        torch.cuda.synchronize()
    tensor = tensor.detach().contiguous()
    if tensor.dtype != torch.float8_e4m3fn:
        return jax.dlpack.from_dlpack(tensor)
    return jax.lax.bitcast_convert_type(jax.dlpack.from_dlpack(tensor.view(torch.uint8)), jnp.float8_e4m3fn)


def to_torch(array: jax.Array) -> Tensor:
    if array.dtype != jnp.float8_e4m3fn:
        return torch.from_dlpack(array.block_until_ready())
    return to_torch(jax.lax.bitcast_convert_type(array, jnp.uint8)).view(torch.float8_e4m3fn)


@functools.cache
def _compiled(name: str, static: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(functools.partial(getattr(jax_binding, name), **dict(static)))


def _run(name: str, *operands: Tensor | None, **static: Any) -> Any:
    results = _compiled(name, tuple(sorted(static.items())))(*map(to_jax, operands))
    return jax.tree.map(to_torch, results)


def gmm(x: Tensor, w: Tensor, sizes: Tensor, offset: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    return _run("gmm", x, w, sizes, group_offset=offset, dtype=DTYPES[dtype or x.dtype])


def gmm_t(x: Tensor, w: Tensor, sizes: Tensor, offset: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    return _run("gmm_t", x, w, sizes, group_offset=offset, dtype=DTYPES[dtype or x.dtype])


def tgmm(x: Tensor, g: Tensor, sizes: Tensor, groups: int, offset: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    return _run("tgmm", x, g, sizes, groups=groups, group_offset=offset, dtype=DTYPES[dtype or x.dtype])


def tgmm_into(x: Tensor, g: Tensor, sizes: Tensor, into: Tensor, offset: int = 0) -> None:
    def add(x: Any, g: Any, sizes: Any, into: Any) -> Any:
        return jax_binding.tgmm(x, g, sizes, groups=into.shape[0], group_offset=offset, into=into)

    into.copy_(to_torch(jax.jit(add)(*map(to_jax, (x, g, sizes, into.clone())))))


def gmm_fp8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, sizes: Tensor, offset: int, dtype: Any) -> Tensor:
    return _run("gmm_fp8", x, x_scale, w, w_scale, sizes, group_offset=offset, dtype=DTYPES[dtype])


def gmm_s8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, sizes: Tensor, offset: int, dtype: Any) -> Tensor:
    return _run("gmm_s8", x, x_scale, w, w_scale, sizes, group_offset=offset, dtype=DTYPES[dtype])


def quantize_e4m3(x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    return _run("quantize_e4m3", x, index)


def permute(x: Tensor, index: Tensor) -> Tensor:
    return _run("permute", x, index)


def unpermute(x: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    return _run("unpermute", x, index, weight)


def swiglu(gate_up: Tensor, scale: Tensor | None) -> Tensor:
    return _run("swiglu", gate_up, scale)


def swiglu_grad(gate_up: Tensor, d_out: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return _run("swiglu_grad", gate_up, d_out, scale)


class Cutlass:
    """The products by CUTLASS, bfloat16 in and out."""

    @staticmethod
    def gmm(x: Tensor, w: Tensor, sizes: Tensor, offset: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        return _run("gmm", x, w, sizes, group_offset=offset, by="cutlass")

    @staticmethod
    def gmm_t(x: Tensor, w: Tensor, sizes: Tensor, offset: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        return _run("gmm_t", x, w, sizes, group_offset=offset, by="cutlass")

    @staticmethod
    def tgmm(
        x: Tensor, g: Tensor, sizes: Tensor, groups: int, offset: int = 0, dtype: torch.dtype | None = None
    ) -> Tensor:
        return _run("tgmm", x, g, sizes, groups=groups, group_offset=offset, by="cutlass")
