"""Tokens to the devices of their experts and back, none dropped; to be called inside `jax.shard_map`.

n devices on the axis `expert`, E experts of all devices, k choices per token. Either every device of the axis gets all
its tokens (`Links.gather`), n - 1 copies of each, or each token travels to its choices (`Journey`), k copies of it.
With 8 choices the first moves less up to 8 devices; the second also keeps what a device holds in proportion to what
its experts were chosen for, up to a bound that no choice can exceed.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from sharding.layout import Layout

Array = jax.Array
AXIS = "expert"


def travels(layout: Layout, choices: int) -> bool:
    """Whether tokens travel to their choices rather than everywhere."""
    if layout.dispatch != "auto":
        return layout.dispatch == "ragged"
    return jax.default_backend() != "cpu" and choices < layout.expert - 1


@dataclass(frozen=True)
class Journey:
    """Where rows that are sorted by their expert go, and where they come from.

    Attributes:
      sent: [n, E], rows of each device for each expert.
      devices: n.
    """

    sent: Array
    devices: int

    @classmethod
    def of(cls, counts: Array, devices: int) -> Journey:
        """From this device's rows for each expert, [E] int32."""
        return cls(lax.all_gather(counts, AXIS), devices)

    @property
    def group_sizes(self) -> Array:
        """[E / n] int32, rows that this device's experts get."""
        return jnp.sum(self._mine(self.sent), axis=0)

    def go(self, rows: Array, size: int) -> Array:
        """Rows [R, ...] sorted by expert, to those of this device's experts, sorted by these: [size, ...]."""
        here = lax.axis_index(AXIS)
        return _exchange(rows, size, self._left()[here], self.sent[here], self._arrives()[here], self._received())

    def back(self, rows: Array, size: int) -> Array:
        """The way back, to [size, ...]; rows that went nowhere are zero."""
        here, experts = lax.axis_index(AXIS), self.sent.shape[1] // self.devices
        start = here * experts

        def mine(x: Array) -> Array:
            """[n, E] to the slices of this device's experts, by the device that they go to."""
            return lax.dynamic_slice_in_dim(x, start, experts, 1).reshape(-1)

        return _exchange(rows, size, mine(self._arrives()), mine(self.sent), mine(self._left()), self.sent[here])

    def _mine(self, x: Array) -> Array:
        experts = x.shape[1] // self.devices
        return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * experts, experts, 1)

    def _received(self) -> Array:
        """[E] int32, by sender, then by expert."""
        return self._mine(self.sent).reshape(-1)

    def _left(self) -> Array:
        """[n, E], where a device's rows for an expert begin among its own."""
        return jnp.cumsum(self.sent, axis=1) - self.sent

    def _arrives(self) -> Array:
        """[n, E], where they begin among those of the expert's device: by expert, then by sender."""
        totals = jnp.sum(self.sent, axis=0).reshape(self.devices, -1)
        of_expert = (jnp.cumsum(totals, axis=1) - totals).reshape(1, -1)
        return of_expert + jnp.cumsum(self.sent, axis=0) - self.sent


def _exchange(rows: Array, size: int, starts: Array, sizes: Array, places: Array, received: Array) -> Array:
    """`lax.ragged_all_to_all` into zeros [size, ...]; slices are in the order of the devices that they go to."""
    out = jnp.zeros((size, *rows.shape[1:]), rows.dtype)
    if jax.default_backend() != "cpu":
        return lax.ragged_all_to_all(rows, out, starts, sizes, places, received, axis_name=AXIS)
    # XLA's CPU backend has no such operation. The same, read from everybody's rows.
    devices = lax.axis_size(AXIS)
    slices = starts.shape[0] // devices
    everything = lax.all_gather(rows, AXIS)

    def to_here(x: Array) -> Array:
        return lax.dynamic_slice_in_dim(lax.all_gather(x, AXIS), lax.axis_index(AXIS) * slices, slices, 1).reshape(-1)

    starts, sizes, places = (to_here(x) for x in (starts, sizes, places))
    offset = jnp.arange(size, dtype=jnp.int32)[:, None] - places[None]
    inside = (offset >= 0) & (offset < sizes[None])
    sender = jnp.repeat(jnp.arange(devices, dtype=jnp.int32), slices, total_repeat_length=devices * slices)
    source = jnp.sum(jnp.where(inside, sender * rows.shape[0] + starts + offset, 0), axis=1)
    found = everything.reshape(-1, *rows.shape[1:])[source]
    return jnp.where(inside.any(axis=1).reshape(-1, *[1] * (rows.ndim - 1)), found, out)
