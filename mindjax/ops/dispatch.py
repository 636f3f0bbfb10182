"""Where an operation has a kernel of its own on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax

from kernels_cuda import jax_binding, jax_fused


def on_cpu(kernel: Callable[..., Any], default: Callable[..., Any], *operands: Any) -> Any:
    """`kernel(*operands)` in programs for one CPU device where the library is there, `default(*operands)` elsewhere.

    To be called inside the two functions of a custom_vjp, not around them: both sides are traced.
    """
    if not jax_fused.usable():
        return default(*operands)
    return lax.platform_dependent(*operands, cpu=kernel, default=default)


def on_cpu_and_cuda(kernel: Callable[..., Any], default: Callable[..., Any], *operands: Any) -> Any:
    """`kernel(*operands)` where `on_cpu` has it so and on CUDA where its library is there, `default` elsewhere."""
    paths = {"cpu": kernel} if jax_fused.usable() else {}
    if jax_binding.available("cuda"):
        paths["cuda"] = kernel
    return lax.platform_dependent(*operands, default=default, **paths) if paths else default(*operands)
