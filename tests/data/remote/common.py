"""What the tests of remote files share: a size, time-outs, processes, and looking into a cache."""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE = 300_000
"""Bytes of each served file: more than what a transfer must move within the time-out."""
SHORT_S = 0.3
"""A time-out where a test waits for it; elsewhere it is long, for a busy machine."""
FORK = multiprocessing.get_context("fork")


def known(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def files_in(cache: Path) -> list[str]:
    notes = (".turn.lock", ".room.lock")
    names = (path.name for path in cache.iterdir())
    return sorted(name for name in names if name not in notes and not name.endswith(".failed"))


def in_processes(count: int, work: Callable[[int], None]) -> list[int | None]:
    """Exit codes."""
    processes = [FORK.Process(target=work, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
