"""The KV cache of batched sampling: what a prompt's prefill leaves, shared by its samples, and what each adds.

P prompts, N samples of each, R rows: all P x N of them, or those that are left; S prompt tokens (padded), C capacity
for new tokens, K key/value heads, G query heads per key/value head, D head size, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_cuda import jax_fused
from mindjax.ops.attention import MASKED
from mindjax.ops.bits import from_bits, to_bits
from mindjax.ops.dispatch import on_cpu

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Keys and values of the prompts, read by all their samples and never written again.

    Attributes:
      k, v: [L, P, K, S, D]; heads come before tokens, so that decoding multiplies without transposing.
      segment_ids: [P, S] int32, 0 in padding.
    """

    k: Array
    v: Array
    segment_ids: Array

    @classmethod
    def from_prefill(cls, kv: tuple[Array, Array], segment_ids: Array) -> Prefix:
        """From the state of `forward(keep_kv=True)`, [L, P, S, K, D] each."""
        k, v = (jnp.swapaxes(part, 2, 3) for part in kv)
        return cls(k, v, segment_ids)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generated:
    """Keys and values of the tokens generated so far; all rows are at the same step, so one index serves all.

    Attributes:
      k, v: [L, R, K, C, D], two-byte floats as their bits: `append` writes into them once per layer and token, for
        which XLA's CPU backend would convert the whole cache to float32 and back, see `mindjax.ops.bits`.
      row: [R] int32, rising: number p * N + n is sample n of prompt p.
      samples: N.
    """

    k: Array
    v: Array
    row: Array
    samples: int = field(metadata={"static": True})

    @classmethod
    def empty(cls, prefix: Prefix, samples: int, capacity: int) -> Generated:
        """For so many samples of each prompt."""
        layers, prompts, heads, _, width = prefix.k.shape
        rows = prompts * samples
        zeros = to_bits(jnp.zeros((layers, rows, heads, capacity, width), prefix.k.dtype))
        return cls(zeros, zeros, jnp.arange(rows, dtype=jnp.int32), samples)

    def append(self, layer: Array, step: Array, k: Array, v: Array) -> Generated:
        """With k, v [R, 1, K, D] of one new token per row at place `step` of `layer`; in place under jit."""
        start = (layer, 0, 0, step, 0)
        shape = (1, *self.k.shape[1:3], 1, self.k.shape[4])
        return replace(
            self,
            k=lax.dynamic_update_slice(self.k, to_bits(k.reshape(shape)), start),
            v=lax.dynamic_update_slice(self.v, to_bits(v.reshape(shape)), start),
        )

    def keep(self, places: Array) -> Generated:
        """Of the rows at these places alone, rising."""
        return replace(self, k=self.k[:, places], v=self.v[:, places], row=self.row[places])


def _layer(part: Array, layer: Array, dtype: jnp.dtype) -> Array:
    """Keys or values of one layer, in the dtype that was appended."""
    return from_bits(lax.dynamic_index_in_dim(to_bits(part), layer, keepdims=False), dtype)


def decode_attention(
    q: Array, k: Array, v: Array, prefix: Prefix, generated: Generated, layer: Array, step: Array
) -> tuple[Array, Generated]:
    """One new token per row enters the cache and attends to its prompt and to what the row has generated, with itself.

    Args:
      q: [R, 1, K x G, D].
      k, v: [R, 1, K, D], of the new token.
      prefix, generated: the whole cache; no layer of it is copied on a CPU.
      layer, step: scalar int32, where the new token belongs.

    Returns:
      ([R, 1, K x G, D] in q's dtype, the cache with the new token in place); scores and softmax are float32.
    """

    def kernel(q: Array, k: Array, v: Array, prefix: Prefix, generated: Generated, *place: Array) -> Any:
        old, own = (prefix.k, prefix.v), (generated.k, generated.v)
        number = generated.row // generated.samples
        out, own = jax_fused.decode_attention(q, k, v, old, own, prefix.segment_ids, number, *place)
        return out, replace(generated, k=own[0], v=own[1])

    def default(q: Array, k: Array, v: Array, prefix: Prefix, generated: Generated, *place: Array) -> Any:
        layer, step = place
        generated = generated.append(layer, step, k, v)
        old = _layer(prefix.k, layer, k.dtype), _layer(prefix.v, layer, k.dtype)
        own = _layer(generated.k, layer, k.dtype), _layer(generated.v, layer, k.dtype)
        return _attend(q, old, own, prefix.segment_ids, step, generated), generated

    return on_cpu(kernel, default, q, k, v, prefix, generated, layer, step)


def _attend(
    q: Array,
    prefix: tuple[Array, Array],
    own: tuple[Array, Array],
    prefix_segment_ids: Array,
    step: Array,
    generated: Generated,
) -> Array:
    """The samples of a prompt read its keys together, one product for all, instead of N copies of them.

    Args:
      prefix: k, v of one layer, [P, K, S, D].
      own: k, v of one layer, [R, K, C, D], valid up to and including `step`.
      prefix_segment_ids: [P, S], 0 is never attended to.
      generated: says which rows they are.
    """
    (pk, pv), (gk, gv) = prefix, own
    prompts, kv_heads, length, dim = pk.shape
    rows, samples, capacity = q.shape[0], generated.samples, gk.shape[2]
    groups = q.shape[2] // kv_heads
    whole = rows == prompts * samples

    def by_head(x: Array) -> Array:
        """[R, K, G, X] as [P, K, N x G, X], zeros where a row is gone."""
        full = x if whole else jnp.zeros((prompts * samples, *x.shape[1:]), x.dtype).at[generated.row].set(x)
        full = full.reshape(prompts, samples, *x.shape[1:]).swapaxes(1, 2)
        return full.reshape(prompts, kv_heads, samples * groups, -1)

    def by_row(x: Array) -> Array:
        """The way back."""
        full = x.reshape(prompts, kv_heads, samples, groups, -1).swapaxes(1, 2)
        full = full.reshape(prompts * samples, kv_heads, groups, -1)
        return full if whole else full[generated.row]

    # HIGHEST: see `mindjax.ops.attention`, whose arithmetic this repeats on a cache.
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    product = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    q = q.reshape(rows, kv_heads, groups, dim)
    # All queries of a key/value head in one matrix, on the left: the other way round XLA's CPU backend has no bfloat16
    # product with a float32 result, and says so when it runs.
    old = product("pkmd,pksd->pkms", by_head(q), pk) * dim**-0.5
    old = by_row(jnp.where((prefix_segment_ids != 0)[:, None, None], old, jnp.float32(MASKED)))
    new = product("rkgd,rkcd->rkgc", q, gk) * dim**-0.5
    new = jnp.where((jnp.arange(capacity, dtype=jnp.int32) <= step)[None, None, None], new, jnp.float32(MASKED))
    weights = jax.nn.softmax(jnp.concatenate([old, new], axis=-1), axis=-1).astype(pv.dtype)
    out = by_row(product("pkms,pksd->pkmd", by_head(weights[..., :length]), pv))
    out += product("rkgc,rkcd->rkgd", weights[..., length:], gv)
    return out.reshape(rows, 1, kv_heads * groups, dim).astype(q.dtype)
