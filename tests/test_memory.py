"""Freed memory is given back to the system."""

import ctypes
import os
from pathlib import Path

import pytest

from maskmatch_scale.memory import return_freed_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_memory_is_returned():
    def resident_mb():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    return_freed_memory()
    before = resident_mb()
    pieces = [bytearray(20_000) for _ in range(5_000)]  # below what glibc maps by itself
    held = pieces[-1]
    del pieces
    kept = resident_mb() - before
    return_freed_memory()
    assert kept > 80
    assert resident_mb() - before < 20
    assert len(held) == 20_000
