"""The C library's heap: from which size on a block has pages of its own, which go back when it is freed."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
GROWN = 32 << 20
"""What glibc's threshold grows to by itself, as blocks are freed."""


def map_alone(size: int) -> None:
    """Gives blocks of this size and more pages of their own, in this process.

    A threshold that grows leaves holes in the heap when blocks of many sizes come and go, and a streaming process that
    holds little takes more and more.

    Args:
        size: In bytes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, size)
