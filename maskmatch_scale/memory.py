"""Host memory of this process."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Give memory that was freed back to the system.

    glibc keeps freed pieces below 32 MB for itself, which may add up to a whole model, or stay for good in each of many
    processes. Other libraries of C do nothing here.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
