"""How a process that computes keeps its memory."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MIB = 1 << 20


def keep_freed_memory() -> None:
    """Let the C library keep up to 256 MiB that tensors have freed, for this process and from now on.

    By default glibc gives freed memory back soon, and the next operator faults it in again page by page: a twentieth of
    the time of a small model on a CPU. Without effect where the C library is another.
    """
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 256 * _MIB)
        mallopt(_MMAP_THRESHOLD, 32 * _MIB)
