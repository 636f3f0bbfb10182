"""Arrays from one layout to another, device to device: weights from the trainer to the rollout."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax


def reshard(tree: Any, shardings: Any) -> Any:
    """The same values where `shardings` puts them; no array is ever whole on a host.

    Args:
      tree: arrays. They stay valid.
      shardings: a tree of the same form. Over the same devices this is one compiled exchange, over others a transfer
        between devices.
    """
    leaves, form = jax.tree.flatten(tree)
    places = jax.tree.leaves(shardings)
    here = {device for leaf in leaves for device in leaf.sharding.device_set}
    there = {device for place in places for device in place.device_set}
    if here != there:
        return jax.device_put(tree, shardings)
    return _exchange(form, tuple(places))(tree)


@lru_cache(maxsize=8)
def _exchange(form: Any, places: tuple[Any, ...]) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=jax.tree.unflatten(form, places))
