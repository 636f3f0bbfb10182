"""Operator-level recompute: which named points of a block are kept for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# "none" keeps everything, "full" recomputes the whole block, a tuple keeps the named outputs and recomputes the rest.
Remat = str | tuple[str, ...]
# The points that models mark with `checkpoint_name`.
NAMES = ("qkv", "attention", "mlp_hidden")


def rematerialise(block: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Wraps a scanned block so that its backward pass keeps what `remat` says.

    Raises:
      ValueError: for a name that no model marks.
    """
    if remat == "none":
        return block
    names = () if remat == "full" else remat
    unknown = [names] if isinstance(names, str) else sorted(set(names) - set(NAMES))
    if unknown:
        raise ValueError(f"remat names {unknown}; write 'none', 'full', or a tuple of {NAMES}")
    # prevent_cse is only needed outside scan.
    return jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names(*names), prevent_cse=False)
