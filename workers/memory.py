"""How a process of ours keeps the memory that it needs again a moment later."""

from __future__ import annotations

import ctypes
import gc

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
LARGEST = 32 << 20
"""Bytes of a piece that is kept for the next one like it; the most that glibc allows."""
KEPT = 64 << 20
"""Free bytes at the end of the heap that are kept."""


def settle() -> None:
    """Call it once everything is loaded.

    By itself glibc gives tensors back to the kernel when they are done with, to be handed new pages
    for the next ones: page by page, 700 page faults for one of 600 KB on its way through a worker,
    which cost more than all else that was done with it. And what has been loaded stays: the garbage
    collector need not look through it again and again, tens of milliseconds each time, in which
    nobody is served.
    """
    try:
        allocator = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        pass  # Another C library, with ways of its own.
    else:
        allocator(_MMAP_THRESHOLD, LARGEST)
        allocator(_TRIM_THRESHOLD, KEPT)
    gc.collect()
    gc.freeze()
    # What a request leaves behind is mostly gone by itself.
    gc.set_threshold(20_000, 20, 50)
