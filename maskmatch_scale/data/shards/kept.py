"""Numbers that take long to find, kept in a folder of this machine: found once, by one process, for all others.

A file is there whole or not at all. It is named by a digest of all that its numbers depend on; so it is never out of
date, and may be deleted at any time. What was found so far may be kept, too, for a start that is interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.remote import file_locks
from maskmatch_scale.data.remote.cache_place import is_shared_by_machines
from maskmatch_scale.files import disk_fault, file_whole, write_whole

log = logging.getLogger("maskmatch_scale")

Numbers = NDArray[np.int64]
_POLL_S = 0.2
_SECONDS_BETWEEN_LINES = 60.0


class Unfinished:
    """What was found so far. Of a process that was interrupted, the next one goes on with it.

    Args:
        folder: where it is kept.
        name: of the files.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}.part.npy"

    def read(self) -> tuple[Numbers, dict[str, Any]] | None:
        """What :meth:`write` was given last; None: nothing that is whole."""
        found = _read(self._path)
        if found is None or found[1].get("numbers") not in range(len(found[0]) + 1):
            return None
        numbers, facts = found
        return numbers[: facts.pop("numbers")], facts

    def write(self, numbers: Numbers, facts: dict[str, Any]) -> None:
        """Keep it, if the disk takes it: numbers that begin with those of the last time, and facts for JSON."""
        with suppress(OSError):
            _write(self._path, numbers, facts | {"numbers": len(numbers)})

    def remove(self) -> None:
        """It is not needed any more."""
        for path in (self._path, self._path.with_suffix(".json")):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def kept_numbers(
    folder: Path, name: str, find: Callable[[Unfinished], tuple[Numbers, dict[str, Any]]], what: str
) -> tuple[Numbers, dict[str, Any]]:
    """Read numbers that were found before, or find them and keep them.

    While one process finds them, the others of this machine wait, and say so. If the folder cannot be written to, each
    process finds them for itself.

    Args:
        folder: made if it is not there.
        name: of the files; with a digest of what the numbers depend on.
        find: returns int64 (n, …), and facts about them for JSON; it is given a place for what it has found so far.
        what: what is found, for the log.

    Returns:
        What ``find`` returned, now or then. The array is mapped from the file where it can be, so that processes share
        its memory.

    Raises:
        Exception: what ``find`` raised; nothing is kept then.
    """
    path = folder / f"{name}.npy"
    if (found := _read(path)) is not None:
        return found
    with _only_one(folder, name, what):
        if (found := _read(path)) is not None:  # of another process, meanwhile
            return found
        unfinished = Unfinished(folder, name)
        numbers, facts = find(unfinished)
        try:
            _write(path, numbers, facts)
        except OSError as error:
            log.warning("%s: %s; it is not kept for other processes", what, disk_fault(error) or error)
            return numbers, facts
        unfinished.remove()
    return _read(path) or (numbers, facts)


def _write(path: Path, numbers: Numbers, facts: dict[str, Any]) -> None:
    with file_whole(path) as beside, beside.open("wb") as file:
        np.save(file, numbers, allow_pickle=False)
    write_whole(path.with_suffix(".json"), json.dumps(facts))


def _read(path: Path) -> tuple[Numbers, dict[str, Any]] | None:
    """None: it is not there, or damaged."""
    try:
        facts = json.loads(path.with_suffix(".json").read_bytes())
        # Nothing can be mapped from a file without numbers; and what another machine replaces would end this process.
        mapped = path.stat().st_size > 200 and not is_shared_by_machines(path)
        numbers = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(facts, dict) or numbers.dtype != np.int64:
        return None
    with suppress(OSError):
        os.utime(path)  # for those who delete what is old
    return np.asarray(numbers), facts


@contextmanager
def _only_one(folder: Path, name: str, what: str) -> Iterator[None]:
    """Let no other process of this machine do the same while the body runs; without a folder to write to, all do."""
    began = said = time.monotonic()
    descriptor: int | None = None
    path = folder / f".{name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while (descriptor := file_locks.take(path, wait=False, may_be_removed=True)) is None:
            if time.monotonic() - said >= _SECONDS_BETWEEN_LINES or said == began:
                said = time.monotonic()
                log.warning("%s: another process of this machine does it; waited %.0f s so far", what, said - began)
            time.sleep(_POLL_S)
    except OSError:
        descriptor = None
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                path.unlink()
            file_locks.release(descriptor)
