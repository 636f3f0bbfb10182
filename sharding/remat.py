"""Operator-level recompute: which named points of a block are kept for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# "none" keeps everything, "full" recomputes the whole block, a tuple keeps the named outputs and recomputes the rest.
Remat = str | tuple[str, ...]
# The points that models mark with `checkpoint_name`.
NAMES = ("qkv", "attention", "mlp_hidden")

# As `sharding.links` marks them.
_ALL_BUT_WEIGHTS = jax.checkpoint_policies.save_anything_except_these_names("weights")


def rematerialise(block: Callable[..., Any], remat: Remat, *, gathers: bool = False) -> Callable[..., Any]:
    """Wraps a scanned block so that its backward pass keeps what `remat` says.

    Args:
      block: marks points with `checkpoint_name`.
      remat: see `Remat`.
      gathers: whether the block joins its weights from several devices. They are then joined again for the backward
        pass, whatever `remat` says: kept for all layers, they would be the whole model.

    Raises:
      ValueError: for a name that no model marks.
    """
    if remat == "none":
        if not gathers:
            return block
        return jax.checkpoint(block, policy=_ALL_BUT_WEIGHTS, prevent_cse=False)
    names = () if remat == "full" else remat
    unknown = [names] if isinstance(names, str) else sorted(set(names) - set(NAMES))
    if unknown:
        raise ValueError(f"remat names {unknown}; write 'none', 'full', or a tuple of {NAMES}")
    # prevent_cse is only needed outside scan.
    return jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names(*names), prevent_cse=False)
