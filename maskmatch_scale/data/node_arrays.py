"""Arrays that one process of a node makes and all its processes map: they take memory once a node.

A folder on a local disk holds them, a file for each set of arrays, in safetensors' format
(https://github.com/huggingface/safetensors#format)::

    KIND-KEY.safetensors               named arrays
    .KIND-KEY.safetensors.lock         locked by the process that makes them
    .KIND-KEY.safetensors.<hex>.new    being written; what a process leaves that is killed, later ones remove

A file is there whole or not at all, and is never changed. It may be removed at any time: who has mapped it keeps its
arrays, and others make it again. Where the folder cannot be written to, each process has arrays of its own. So it has
on a disk on a network: what another machine removes or replaces there ends a process that has mapped it (SIGBUS).

Decision: docs/decisions/0069-arrays-of-a-node.md.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from maskmatch_scale.data.remote import file_locks
from maskmatch_scale.data.remote.cache_place import is_shared_by_machines
from maskmatch_scale.files import disk_fault, name_of_unfinished, write_whole
from maskmatch_scale.memory import return_freed_memory

log = logging.getLogger("maskmatch_scale")

Arrays = Mapping[str, NDArray[Any]]

LARGE = 50_000
"""From so many elements on, arrays are worth a file: below, they take less than a megabyte in each process."""

_MOST_BYTES = 2_000_000_000
"""Of all files of a folder; beyond it, those that were opened least recently are removed."""
_ABANDONED_S = 3600.0
"""A file that is being written, but has not grown for so long, is one that a process left that was killed."""
_ENDING = ".safetensors"
_DTYPES = {"I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}
_warned: set[Path] = set()
"""Folders of which this process has said that they cannot be written to."""


@dataclass(frozen=True)
class NodeArrays:
    """Sets of arrays in a folder; picklable.

    Attributes:
        folder: on a local disk; made when the first file is.
    """

    folder: Path

    def find(self, kind: str, key: str) -> Arrays | None:
        """Arrays that are there, mapped; None if they are not. Arguments as in :meth:`get`."""
        return _mapped(self._path(kind, key))

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / f"{kind}-{key}{_ENDING}"

    def get(self, kind: str, key: str, make: Callable[[], Arrays], *, most: int) -> Arrays:
        """Arrays by name, read-only: mapped if possible.

        Args:
            kind: of the arrays.
            key: hex digest of what they are made from.
            make: makes them: int64, uint8 or bool. Called by one process at a time, and only if they are not there.
            most: files of this kind that are kept.

        Raises:
            Exception: what ``make`` raises.
        """
        if (found := self.find(kind, key)) is not None:
            return found
        path = self._path(kind, key)
        lock = self._lock(path)
        try:
            if lock is not None and (found := _mapped(path)) is not None:  # another process has made them meanwhile
                return found
            made = make()
            found = self._keep(path, made, kind, most) if lock is not None else None
            if found is not None:
                del made
                return_freed_memory()  # several times an order, in each process that has made one
                return found
        finally:
            if lock is not None:
                with suppress(OSError):
                    _lock_of(path).unlink()  # before the release: file_locks.take notices it in those that wait
                file_locks.release(lock)
        return made

    def _lock(self, path: Path) -> int | None:
        """Wait until this process alone may make a file; None if that cannot be had."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # addresses of shards may have secrets
            return file_locks.take(_lock_of(path), wait=True, may_be_removed=True)
        except OSError as error:
            self._warn(error)
            return None

    def _keep(self, path: Path, made: Arrays, kind: str, most: int) -> Arrays | None:
        """Write arrays and map them; None if they cannot be written."""
        try:
            self._drop_unfinished(path)
            write_whole(path, save({name: np.ascontiguousarray(array) for name, array in made.items()}), mode=0o600)
            self._drop_old(path, kind, most)
        except OSError as error:
            self._warn(error)
            return None
        return _mapped(path)

    def _drop_unfinished(self, path: Path) -> None:
        """Remove what processes have left that were killed: of the file that is locked, and of any others."""
        for other in self.folder.iterdir():
            if (whole := name_of_unfinished(other.name)) is not None:
                with suppress(FileNotFoundError):
                    if whole == path.name or time.time() - other.stat().st_mtime > _ABANDONED_S:
                        other.unlink()

    def _drop_old(self, new: Path, kind: str, most: int) -> None:
        """Remove what is beyond the bounds, but not the file that was just made."""
        files = []
        for path in self.folder.glob(f"*{_ENDING}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((path == new, status.st_mtime_ns, status.st_size, path))
        total, of_kind = 0, 0
        for is_new, _, size, path in sorted(files, reverse=True):
            total += size
            of_kind += path.name.startswith(f"{kind}-")
            if not is_new and (total > _MOST_BYTES or (of_kind > most and path.name.startswith(f"{kind}-"))):
                path.unlink(missing_ok=True)

    def _warn(self, error: OSError) -> None:
        if self.folder not in _warned:
            _warned.add(self.folder)
            said = disk_fault(error) or f"{self.folder}: {error}"
            log.warning(
                "%s (data.cache_dir); until then each process has its own copy of large indexes and orders", said
            )


class _Mapped(np.ndarray[Any, Any]):
    """An array in a mapped file. It is pickled as the name of the file, so that another process maps it, too."""

    at: tuple[Path, str] | None = None
    """File, and name of the array in it; None for an array that was computed from a mapped one."""

    def __reduce__(self) -> Any:
        if self.at is None:
            return np.asarray(self).__reduce__()
        with suppress(OSError):
            os.utime(self.at[0])  # it is needed again soon
        return _reopened, self.at


def _reopened(path: Path, name: str) -> NDArray[Any]:
    found = _mapped(path)
    if found is None:
        raise FileNotFoundError(f"{path}: it was removed while a process started that needs it; start again")
    return found[name]


def _mapped(path: Path) -> Arrays | None:
    """The arrays of a file, mapped if that is safe; None if it is not there, or damaged."""
    try:
        with path.open("rb") as file:
            read = _is_shared_by_machines(path.parent)
            memory = file.read() if read else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(memory[:8], "little")
        arrays = {}
        for name, entry in json.loads(memory[8:begin]).items():
            first, end = entry["data_offsets"]
            array = _Mapped(entry["shape"], _DTYPES[entry["dtype"]], buffer=memory, offset=begin + first)
            if array.nbytes != end - first:
                return None
            array.at = path, name
            arrays[name] = array
        with suppress(OSError):
            os.utime(path)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return arrays


_is_shared_by_machines = lru_cache(maxsize=8)(is_shared_by_machines)


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")
