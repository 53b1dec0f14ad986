"""A folder of files with a bound on their bytes, shared by any number of processes.

::

    sha256-<hex>              a whole file, named by its checksum …
    url-<hex>                 … or, where none is known, by a hash of its address
    .<name>.<random>.part     a file on its way, already as long as it will be: its room is taken
    .<name>.lock              held by the one that fetches the file
    .<name>.failed            why it could not be fetched, for those that waited for it
    .turn.lock .room.lock     held by the first that waits for room; while room is counted and made

Other files in the folder are neither counted nor touched. Locks are the kernel's and end with the process that holds
them. On a file system without locks a file may be fetched twice and the bound be passed for a moment; no more.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from maskmatch_scale.data.faults import DataError

_WHOLE = re.compile(r"(sha256|url)-[0-9a-f]{64}")
_PART = re.compile(r"\.(sha256|url)-[0-9a-f]{64}\.[0-9a-f]{16}\.part")
_TOUCHED_EVERY_S = 60.0
"""A use is noted no more often: a shard gives thousands of samples."""
_SILENT_S = 600.0
"""Without locks, a part that has not grown for so long belongs to nobody."""
_POLL_S = 0.1

_held: set[int] = set()
"""Descriptors that carry a lock of this process."""


def _forget_locks() -> None:
    # A forked child shares its parent's locks: they would outlive a parent that is killed.
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


class NoRoom(Exception):  # noqa: N818 - not an error: the transfer gives back its room and starts again with more
    """Files that others are fetching take the room.

    Attributes:
        wanted: bytes that were asked for.
    """

    def __init__(self, wanted: int) -> None:
        super().__init__(wanted)
        self.wanted = wanted


class CacheFolder:
    """Files by name, the least recently used of them dropped where room is needed.

    Files that are dropped while somebody has them open live on until they are closed; they count no more.

    Args:
        path: the folder; made if it is not there.
        limit_bytes: bound on all files, those on their way included.

    Raises:
        DataError: the folder cannot be made.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)

    def open(self, name: str, size: int | None = None) -> BinaryIO | None:
        """A file that is there, opened; None if it is not.

        Args:
            name: of the file.
            size: in bytes, if known. A file of another size is dropped; its checksum was compared when it came and is
                not again.
        """
        path = self.path / name
        try:
            with _explained(self.path, FileNotFoundError):
                file = path.open("rb")
        except FileNotFoundError:
            return None
        status = os.fstat(file.fileno())
        if size is not None and status.st_size != size:
            file.close()
            path.unlink(missing_ok=True)
            return None
        if time.time() - status.st_mtime > _TOUCHED_EVERY_S:
            with suppress(OSError):  # dropped meanwhile, or another user's
                os.utime(path)
        return file

    @contextmanager
    def only_one(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Keep others from fetching the file; gives False at once if ``wait`` is False and another one is at it."""
        with _locked(self.path / f".{name}.lock", wait=wait, remove=True) as locked:
            yield locked

    @contextmanager
    def begin(self, name: str, size: int) -> Iterator[Part]:
        """A new file with room for ``size`` bytes; waits until others have finished if they take the room.

        What is not kept (:meth:`Part.keep`) is gone afterwards.

        Raises:
            DataError: it could never fit, or the folder cannot be written to.
        """
        self._refuse_too_large(size)
        with _explained(self.path):
            part = self._begin(name, size)
        try:
            yield part
        finally:
            part.close()

    def _begin(self, name: str, size: int) -> Part:
        # In turn: a large file must not wait for ever behind small ones. Whoever is on the way needs no turn to end.
        with _locked(self.path / ".turn.lock"):
            while True:
                with _locked(self.path / ".room.lock"):
                    if self._make_room(size):
                        path = self.path / f".{name}.{secrets.token_hex(8)}.part"
                        return Part(self, path, self.path / name, size)
                time.sleep(_POLL_S)

    def _make_room(self, size: int, own: Path | None = None) -> bool:
        """Drop what was used least recently until ``size`` bytes fit; False if only files on their way are left."""
        on_the_way, whole = 0, []
        with os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if _WHOLE.fullmatch(entry.name):
                        status = entry.stat()
                        whole.append((status.st_mtime, status.st_size, entry.name))
                    elif _PART.fullmatch(entry.name) and entry.name != (own and own.name):
                        status = entry.stat()
                        if _is_abandoned(entry.path, status.st_mtime):
                            Path(entry.path).unlink()
                        else:
                            on_the_way += status.st_size
        spare = self.limit_bytes - on_the_way - size
        if spare < 0:
            return False
        used = sum(bytes_ for _, bytes_, _ in whole)
        for _, bytes_, name in sorted(whole):
            if used <= spare:
                break
            (self.path / name).unlink(missing_ok=True)
            used -= bytes_
        return True

    def _refuse_too_large(self, size: int) -> None:
        if size > self.limit_bytes:
            raise DataError(
                f"{self.path}: a file of {size / 1e9:.3g} GB does not fit into a cache of "
                f"{self.limit_bytes / 1e9:.3g} GB; raise data.cache_gb"
            )


class Part:
    """A file on its way into a cache folder. Made by :meth:`CacheFolder.begin`."""

    def __init__(self, folder: CacheFolder, path: Path, place: Path, room: int) -> None:
        self._folder, self._path, self._place, self._room = folder, path, place, room
        self._file = path.open("x+b")
        _held.add(self._file.fileno())
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.truncate(room)

    def resize(self, size: int) -> None:
        """Take room for ``size`` bytes in all.

        Raises:
            NoRoom: others that are on their way take it.
            DataError: it could never fit, or the folder cannot be written to.
        """
        self._folder._refuse_too_large(size)
        with _explained(self._folder.path):
            if size > self._room:
                # Without waiting: of two that wait with half a file each, neither would end.
                with _locked(self._folder.path / ".room.lock"):
                    if not self._folder._make_room(size, own=self._path):
                        raise NoRoom(size)
                    self._file.truncate(size)
            else:
                self._file.truncate(size)
        self._room = size

    def write(self, block: bytes, at: int) -> None:
        """Write ``block`` at byte ``at``, in more room if needed; raises as :meth:`resize` does."""
        end = at + len(block)
        if end > self._room:
            self.resize(max(end, min(self._room * 3 // 2, self._folder.limit_bytes)))
        with _explained(self._folder.path):
            self._file.seek(at)
            self._file.write(block)

    def keep(self, size: int) -> BinaryIO:
        """Put the first ``size`` bytes in place as the whole file, and open it: nobody can drop it in between."""
        with _explained(self._folder.path):
            self._file.truncate(size)  # flushes
            file = self._path.open("rb")
            try:
                self._path.replace(self._place)
            except OSError:
                file.close()
                raise
        return file

    def close(self) -> None:
        """Remove what was not kept."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        _release(self._file.fileno(), close=False)
        with suppress(OSError):  # bytes that a full disk did not take
            self._file.close()


def _is_abandoned(path: str, modified: float) -> bool:
    """Whether the process that began this part has ended."""
    try:
        with Path(path).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks, or another user's file
        return time.time() - modified > _SILENT_S
    return True


@contextmanager
def _locked(path: Path, *, wait: bool = True, remove: bool = False) -> Iterator[bool]:
    """Hold the lock that this file stands for; ``remove`` takes the file away afterwards."""
    descriptor = _lock(path, wait, remove)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        if remove:
            with suppress(OSError):
                path.unlink()  # before the release: those that wait for it find out in _lock
        _release(descriptor)


def _lock(path: Path, wait: bool, removed: bool) -> int | None:
    while True:
        with _explained(path.parent):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            _release(descriptor)
            return None
        except OSError:
            return descriptor  # a file system without locks
        except BaseException:
            _release(descriptor)
            raise
        if not removed or _is_at(descriptor, path):
            return descriptor
        _release(descriptor)  # the lock of a file that is gone: others hold that of its successor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _release(descriptor: int, *, close: bool = True) -> None:
    # Said, not left to closing: a child forked while this was held may still have it open.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    _held.discard(descriptor)
    if close:
        os.close(descriptor)


@contextmanager
def _explained(folder: Path, expected: type[OSError] | tuple[()] = ()) -> Iterator[None]:
    try:
        yield
    except expected:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            f"{folder}: {'the disk is full' if full else error.strerror or error}; the shards' cache needs a folder "
            "it can write to: free some room, lower data.cache_gb, or name another folder by data.cache_dir"
        ) from None
