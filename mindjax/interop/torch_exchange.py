"""Arrays between JAX and torch without a copy, by DLPack: one array or any tree of them, on the CPU or one GPU.

Both sides see the same memory. JAX takes its arrays to be constant: who writes into a shared tensor changes an array
that compiled code may have read already. Keep writing to the side that made the memory, and after it is no longer
read by the other.
"""

from __future__ import annotations

from typing import Any

import jax
import torch


def to_torch(tree: Any) -> Any:
    """JAX arrays as torch tensors in the same memory.

    Args:
      tree: an array, or any pytree of arrays (a model's parameters). Each lies on one device, of a dtype that DLPack
        has (floats, bfloat16, integers, bool; float8 from DLPack 1.1 on).

    Returns:
      The same tree with tensors, which keep the memory alive. The device's pending work is waited for, on the GPU
      within the current stream.

    Raises:
      ValueError: naming the leaf, where it cannot be shared: no JAX array, spread over devices, or a dtype that
        DLPack lacks.
    """
    return jax.tree_util.tree_map_with_path(_to_torch, tree)


def to_jax(tree: Any) -> Any:
    """Torch tensors as JAX arrays in the same memory.

    Args:
      tree: a tensor, or any pytree of tensors (a state_dict). Each is contiguous, on the CPU aligned to 64 bytes (as
        torch allocates; a slice may not be), needs no gradient, and has a dtype that JAX keeps: 64-bit ones only
        with `jax_enable_x64`.

    Returns:
      The same tree with arrays, which keep the memory alive.

    Raises:
      ValueError: naming the leaf and what to call on it, where it cannot be shared. Nothing is copied or narrowed
        silently.
    """
    return jax.tree_util.tree_map_with_path(_to_jax, tree)


def _to_torch(path: Any, array: Any) -> torch.Tensor:
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        raise ValueError(f"{_named(path)} is no JAX array with memory but {type(array).__name__}; move it out of jit")
    if len(array.devices()) > 1:
        raise ValueError(
            f"{_named(path)} lies on {len(array.devices())} devices and DLPack carries one; share its parts, "
            "[shard.data for shard in array.addressable_shards], or gather it with jax.device_put"
        )
    try:
        return torch.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_named(path)} of {array.dtype} cannot be shared with torch by these versions ({error}); "
            "share its bits as uint8, jax.lax.bitcast_convert_type(array, 'uint8'), or cast it"
        ) from error


def _to_jax(path: Any, tensor: Any) -> jax.Array:
    name = _named(path)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} is no torch tensor but {type(tensor).__name__}")
    if tensor.requires_grad:
        raise ValueError(f"{name} needs a gradient, which JAX would not see; share tensor.detach()")
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(f"{name} {tuple(tensor.shape)} is not contiguous; share tensor.contiguous(), a copy")
    # DLPack drops a pending sign or conjugation, which is kept beside the memory.
    if tensor.is_neg() or tensor.is_conj():
        raise ValueError(f"{name} is a lazy negative or conjugate; share tensor.resolve_neg().resolve_conj()")
    wide = {torch.int64, torch.uint64, torch.float64, torch.complex128}
    if tensor.dtype in wide and not jax.config.read("jax_enable_x64"):
        raise ValueError(f"{name} is {tensor.dtype}, which JAX narrows without jax_enable_x64; cast it to 32 bits")
    try:
        return jax.dlpack.from_dlpack(tensor, copy=False)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        hint = "tensor.clone(), a copy" if "aligned" in str(error) else "its bits, tensor.view(torch.uint8)"
        raise ValueError(f"{name} of {tensor.dtype} cannot be shared with JAX ({error}); share {hint}") from error


def _named(path: Any) -> str:
    return f"leaf {jax.tree_util.keystr(path)}" if path else "the array"
