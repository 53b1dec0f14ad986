"""Locks between processes. A lock is held on an open file; the kernel releases it when the process ends.

On a file system without locks, taking one always succeeds.
"""

from __future__ import annotations

import fcntl
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_held: set[int] = set()
"""Descriptors on which this process holds a lock."""
_opening = threading.Lock()
"""Held from before a file is opened until its descriptor is in `_held`; no child is forked in between."""


def _close_inherited() -> None:
    # A forked child shares its parent's locks: they would outlive a parent that is killed.
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_close_inherited)


def take(path: Path, *, wait: bool, may_be_removed: bool) -> int | None:
    """Take the lock that a file stands for; the file is made if it is not there.

    Args:
        path: the file.
        wait: whether to wait for a process that has the lock.
        may_be_removed: whether those who have the lock remove the file before they release it.

    Returns:
        A descriptor for :func:`release`; None if another one has the lock and ``wait`` is False.

    Raises:
        OSError: the file cannot be made.
    """
    while True:
        with _opening:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            release(descriptor)
            return None
        except OSError:
            return descriptor  # a file system without locks
        except BaseException:
            release(descriptor)
            raise
        if not may_be_removed or _is_at(descriptor, path):
            return descriptor
        release(descriptor)  # the file was removed while we waited; others lock the one that took its place


def create(path: Path) -> BinaryIO:
    """Make a new file and lock it, until :func:`release`.

    Raises:
        OSError: it exists, or cannot be made.
    """
    with _opening:
        file = path.open("x+b")
        _held.add(file.fileno())
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def release(descriptor: int, *, close: bool = True) -> None:
    """Release a lock, and close its file unless ``close`` is False."""
    # Closing alone does not always release it: a child that was forked meanwhile may still have the file open.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    _held.discard(descriptor)
    if close:
        os.close(descriptor)


def is_held(path: str) -> bool | None:
    """Whether a process has a file locked; None if that cannot be told: no locks here, or another user's file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        with Path(path).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        raise
    except OSError:
        return None
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
