"""What the files of a cache share: locks between processes, and what the user is told if the disk fails."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote import file_locks


@contextmanager
def locked(path: Path, *, wait: bool = True, remove: bool = False) -> Iterator[bool]:
    """Hold the lock that a file stands for; yields False if another one has it and ``wait`` is False.

    Args:
        path: the file.
        wait: whether to wait for the lock.
        remove: whether the file is removed at the end.
    """
    with explained(path.parent):
        descriptor = file_locks.take(path, wait=wait, may_be_removed=remove)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        if remove:
            with suppress(OSError):
                path.unlink()  # before the release: file_locks.take notices it in those that wait
        file_locks.release(descriptor)


@contextmanager
def explained(folder: Path, expected: type[OSError] | tuple[()] = ()) -> Iterator[None]:
    """Turn an OSError into a DataError that says what to do, except those that are expected, and a lack of
    descriptors.
    """
    try:
        yield
    except expected:
        raise
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # not the folder's fault: whoever keeps files open mends it
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            f"{folder}: {'the disk is full' if full else error.strerror or error}; the shards' cache needs a folder "
            "it can write to: free some room, lower data.cache_gb, or name another folder by data.cache_dir"
        ) from None
