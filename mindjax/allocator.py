"""Keeping freed memory in the process, so that a training step on the CPU does not fault its buffers in anew."""

from __future__ import annotations

import ctypes
import sys

# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tells glibc to keep large freed blocks in one arena instead of giving them back to the kernel.

    XLA's CPU backend allocates a step's temporaries anew in every call. Beyond 32 MB glibc maps and unmaps them, and
    the kernel zeroes every page again: a third of the processor time of a small model's step (docs/log.md). The
    resident size stays at its peak, which a training loop reaches again in every step anyway.

    Returns:
      Whether it was done; False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _ARENA_MAX: 1}
    return all(mallopt(option, value) for option, value in options.items())
