"""Attention over rows whose tokens are split over devices: Ulysses (arXiv:2309.14509) and ring (arXiv:2310.01889).

To be called inside `jax.shard_map`; n devices on the axis. B rows, T tokens of a row, N query heads, K key/value heads,
D head size.

A ring over rows cut in n pieces would leave the first device idle for most of its causal steps. Rows are cut in 2 n
chunks instead, device i holds chunks i and 2 n - 1 - i ("zigzag"), and every step is two products of chunks for all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

# (q, k, v, q segments, k segments, q index) -> (out, logarithm of each query's sum of exponentials [B, N, T]); the
# index of a query among the keys, below 0 where it sees all of them.
Attend = Callable[..., tuple[Array, Array]]
# (the same, out, the logarithm, gradient of out) -> gradients of q, k, v.
AttendGrad = Callable[..., tuple[Array, Array, Array]]


def zigzag(length: int, devices: int) -> np.ndarray:
    """[T] int32: at each place of a row that is split for the ring, the place in the row as it was."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    return np.concatenate([chunks[[i, 2 * devices - 1 - i]].reshape(-1) for i in range(devices)])


def ulysses(
    attention: Callable[..., Array], q: Array, k: Array, v: Array, segment_ids: Array, *, axis: str, devices: int
) -> Array:
    """Trades tokens for heads: every device attends over whole rows with its share of the heads.

    Args:
      attention: (q, k, v, segment ids) -> out, of whole rows.
      q: [B, T / n, N, D].
      k, v: [B, T / n, K, D]; where n does not divide K they are repeated until it does.
      segment_ids: [B, T / n].

    Returns:
      [B, T / n, N, D].
    """
    repeats = int(np.lcm(k.shape[2], devices)) // k.shape[2]
    if repeats > 1:
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    to_heads = partial(lax.all_to_all, axis_name=axis, split_axis=2, concat_axis=1, tiled=True)
    segments = lax.all_gather(segment_ids, axis, axis=1, tiled=True)
    out = attention(to_heads(q), to_heads(k), to_heads(v), segments)
    return lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def ring(
    attend: Attend, attend_grad: AttendGrad, axis: str, devices: int, q: Array, k: Array, v: Array, segment_ids: Array
) -> Array:
    """Keys and values go round; what a query got from each part is joined by its normaliser.

    Args:
      attend, attend_grad: of one chunk of queries over one chunk of keys.
      q: [B, T / n, N, D], in `zigzag` order.
      k, v: [B, T / n, K, D].
      segment_ids: [B, T / n].

    Returns:
      [B, T / n, N, D].
    """
    return _ring_forward(attend, attend_grad, axis, devices, q, k, v, segment_ids)[0]


def _halves(x: Array) -> list[Array]:
    return jnp.split(x, 2, axis=1)


def _ring_forward(
    attend: Attend, attend_grad: AttendGrad, axis: str, devices: int, q: Array, k: Array, v: Array, segment_ids: Array
) -> tuple[Array, tuple[Array, ...]]:
    me = lax.axis_index(axis)
    queries, segments = _halves(q), _halves(segment_ids)
    chunk = queries[0].shape[1]
    causal, whole = jnp.arange(chunk, dtype=jnp.int32), jnp.full(chunk, -1, jnp.int32)

    def own() -> list[tuple[Array, Array]]:
        """The device's own two chunks: each sees itself causally, and the later one all of the earlier one."""
        keys, values = _halves(k), _halves(v)
        first = _start(attend(queries[0], keys[0], values[0], segments[0], segments[0], causal))
        second = _start(attend(queries[1], keys[1], values[1], segments[1], segments[1], causal))
        return [first, _join(second, attend(queries[1], keys[0], values[0], segments[1], segments[0], whole))]

    def step(carry: Any, number: Array) -> tuple[Any, None]:
        parts, others = carry
        others = _shift(others, axis, devices)
        keys, values, theirs = (_halves(x) for x in others)
        earlier = (me - number) % devices < me  # whose these are stands before this device
        # The later chunk sees the first of theirs in any case; then either the earlier one does too, or the later one
        # sees the second of theirs.
        low, high = parts
        high = _join(high, attend(queries[1], keys[0], values[0], segments[1], theirs[0], whole))
        which = jax.tree.map(partial(jnp.where, earlier), (queries[0], segments[0]), (queries[1], segments[1]))
        other = jax.tree.map(
            partial(jnp.where, earlier), (keys[0], values[0], theirs[0]), (keys[1], values[1], theirs[1])
        )
        found = attend(which[0], other[0], other[1], which[1], other[2], whole)
        low = jax.tree.map(partial(jnp.where, earlier), _join(low, found), low)
        high = jax.tree.map(partial(jnp.where, earlier), high, _join(high, found))
        return ([low, high], others), None

    (parts, _), _ = lax.scan(step, (own(), (k, v, segment_ids)), jnp.arange(1, devices, dtype=jnp.int32))
    out = jnp.concatenate([part for part, _ in parts], axis=1).astype(q.dtype)
    normaliser = jnp.concatenate([logarithm for _, logarithm in parts], axis=2)
    # As `attend` has it: a query that sees nothing has weights of 0 in the backward pass.
    normaliser = jnp.where(jnp.isneginf(normaliser), jnp.inf, normaliser)
    out, normaliser = checkpoint_name(out, "attention"), checkpoint_name(normaliser, "attention")
    return out, (q, k, v, segment_ids, out, normaliser)


def _start(found: tuple[Array, Array]) -> tuple[Array, Array]:
    out, normaliser = found
    return out.astype(jnp.float32), jnp.where(jnp.isposinf(normaliser), -jnp.inf, normaliser)


def _join(a: tuple[Array, Array], found: tuple[Array, Array]) -> tuple[Array, Array]:
    """The attention over two sets of keys from that over each, [B, T, N, D] and [B, N, T] float32."""
    b = _start(found)
    normaliser = jnp.logaddexp(a[1], b[1])
    safe = jnp.where(jnp.isneginf(normaliser), jnp.float32(0), normaliser)
    out = sum(part * jnp.exp(logarithm - safe).swapaxes(1, 2)[..., None] for part, logarithm in (a, b))
    return out, normaliser  # type: ignore[return-value]


def _ring_backward(
    attend: Attend, attend_grad: AttendGrad, axis: str, devices: int, saved: tuple[Array, ...], g: Array
) -> tuple[Array, Array, Array, np.ndarray]:
    q, k, v, segment_ids, out, normaliser = saved
    me = lax.axis_index(axis)
    queries, segments, outs, outer = _halves(q), _halves(segment_ids), _halves(out), _halves(g)
    normalisers = jnp.split(normaliser, 2, axis=2)
    chunk = queries[0].shape[1]
    causal, whole = jnp.arange(chunk, dtype=jnp.int32), jnp.full(chunk, -1, jnp.int32)
    of = [list(x) for x in zip(queries, segments, outs, normalisers, outer, strict=True)]

    def grad(of: list[Array], keys: Array, values: Array, theirs: Array, index: Array) -> tuple[Array, Array, Array]:
        query, segment, out, normaliser, outer = of
        found = attend_grad(query, keys, values, segment, theirs, index, out, normaliser, outer)
        return tuple(x.astype(jnp.float32) for x in found)  # type: ignore[return-value]

    keys, values = _halves(k), _halves(v)
    d_low, dk_low, dv_low = grad(of[0], keys[0], values[0], segments[0], causal)
    d_high, dk_high, dv_high = grad(of[1], keys[1], values[1], segments[1], causal)
    more, dk, dv = grad(of[1], keys[0], values[0], segments[0], whole)
    start = (
        [d_low, d_high + more],
        (k, v, segment_ids),
        ([dk_low + dk, dk_high], [dv_low + dv, dv_high]),
    )

    def step(carry: Any, number: Array) -> tuple[Any, None]:
        (d_low, d_high), others, travelling = carry
        # The gradients of keys and values travel with them.
        others, (dks, dvs) = _shift((others, travelling), axis, devices)
        keys, values, theirs = (_halves(x) for x in others)
        earlier = (me - number) % devices < me
        dq, dk, dv = grad(of[1], keys[0], values[0], theirs[0], whole)
        d_high, dks, dvs = d_high + dq, [dks[0] + dk, dks[1]], [dvs[0] + dv, dvs[1]]
        which = jax.tree.map(partial(jnp.where, earlier), of[0], of[1])
        other = jax.tree.map(
            partial(jnp.where, earlier), (keys[0], values[0], theirs[0]), (keys[1], values[1], theirs[1])
        )
        dq, dk, dv = grad(which, other[0], other[1], other[2], whole)
        zero = jnp.float32(0)
        d_low, d_high = d_low + jnp.where(earlier, dq, zero), d_high + jnp.where(earlier, zero, dq)
        dks = [dks[0] + jnp.where(earlier, dk, zero), dks[1] + jnp.where(earlier, zero, dk)]
        dvs = [dvs[0] + jnp.where(earlier, dv, zero), dvs[1] + jnp.where(earlier, zero, dv)]
        return ([d_low, d_high], others, (dks, dvs)), None

    (dq, _, travelling), _ = lax.scan(step, start, jnp.arange(1, devices, dtype=jnp.int32))
    dk, dv = _shift(travelling, axis, devices)  # home
    join = partial(jnp.concatenate, axis=1)
    nothing = np.zeros(segment_ids.shape, jax.dtypes.float0)
    return join(dq).astype(q.dtype), join(dk).astype(k.dtype), join(dv).astype(v.dtype), nothing


ring.defvjp(_ring_forward, _ring_backward)


def _shift(tree: Any, axis: str, devices: int) -> Any:
    """To the next device."""
    return jax.tree.map(lambda x: lax.ppermute(x, axis, [(i, (i + 1) % devices) for i in range(devices)]), tree)
