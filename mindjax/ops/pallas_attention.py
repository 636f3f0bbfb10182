"""Attention on TPU by splash attention, the Pallas kernel that comes with JAX; elsewhere the same kernel interpreted.

Scores stay on the chip, and blocks that a causal mask empties are not visited.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

# Lanes of a vector register: the kernel works on multiples of it.
LANES = 128
# Queries and keys of a tile. With a head size of 128 in bfloat16 the tiles of the backward kernels take 4 MiB of VMEM.
_TILE = 512


def fits(q: Array, k: Array) -> bool:
    """Whether the kernel takes these: bfloat16, for it would round float32 to that, and lengths of whole registers."""
    return q.dtype == jnp.bfloat16 and q.shape[1] % LANES == 0 and k.shape[1] % LANES == 0


def attention(
    q: Array, k: Array, v: Array, q_segment_ids: Array, kv_segment_ids: Array, *, causal: bool, interpret: bool = False
) -> Array:
    """See `mindjax.ops.attention.attention`; rows of padding attend to padding."""
    # Imported here: Pallas takes a second, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, width, shape = q.shape[2], q.shape[3], (q.shape[1], k.shape[1])
    rows, keys = (_tile(size) for size in shape)
    blocks = splash.BlockSizes(
        block_q=rows, block_kv=keys, block_kv_compute=keys, block_q_dkv=rows, block_kv_dkv=keys,
        block_kv_dkv_compute=keys, block_q_dq=rows, block_kv_dq=keys,
    )  # fmt: skip
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads), block_sizes=blocks, residual_checkpoint_name="attention",
        interpret=interpret,
    )  # fmt: skip
    # The kernel has no scale of its own, and wants whole registers of a head.
    q, k, v = (_heads_first(x) for x in (q * jnp.asarray(width**-0.5, q.dtype), k, v))
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(q_segment_ids, kv_segment_ids))
    return out.swapaxes(1, 2)[..., :width].astype(q.dtype)


def _heads_first(x: Array) -> Array:
    """[B, T, N, D] as [B, N, T, D], D filled with zeros to whole registers."""
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % LANES)))


def _tile(size: int) -> int:
    """The largest multiple of `LANES` up to `_TILE` that divides the size."""
    return max(tile for tile in range(LANES, min(size, _TILE) + 1, LANES) if size % tile == 0)
