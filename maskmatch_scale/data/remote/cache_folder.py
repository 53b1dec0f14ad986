"""A folder of files with an upper bound on their bytes, shared by any number of processes.

::

    sha256-<hex>              a whole file, named by its checksum …
    url-<hex>                 … or, where no checksum is known, by a hash of its address, server and ETag; the checksum
                              of what was fetched is an extended attribute of the file, if the disk can have those
    .<name>.<kind>.table      where the samples of that file lie, for readers that need it labelled or not
    .<name>.<random>.part     a file that is being fetched; it has its final size at once, so that its room is counted
    .<name>.lock              locked by the process that fetches the file
    .<name>.failed            why it could not be fetched, for the processes that waited for it
    .turn.lock                locked by the process whose turn it is to wait for room
    .room.lock                locked while a process counts the bytes in the folder and drops files

Other files in the folder are neither counted nor touched. On a file system without locks a file may be fetched twice,
and the bound may be exceeded for a moment; nothing else happens.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote import file_locks
from maskmatch_scale.data.remote.cache_disk import explained, locked

_WHOLE = re.compile(r"(sha256|url)-[0-9a-f]{64}")
_BESIDE = re.compile(rf"\.({_WHOLE.pattern})\.[a-z]+\.table")
_PARTIAL = re.compile(rf"\.{_WHOLE.pattern}\.[0-9a-f]{{16}}\.part")
_TOUCHED_EVERY_S = 60.0
"""A use of a file is noted at most this often: thousands of samples are read from one shard."""
_SILENT_S = 600.0
"""Without locks, a partial file that was not written to for so long is taken for abandoned."""
_POLL_S = 0.1
_BLOCK = 1 << 20
_DIGEST_ATTRIBUTE = "user.maskmatch.sha256"


class NoRoom(Exception):  # noqa: N818 - not an error: the fetch gives up its room and begins again with more
    """Files that other processes are fetching take the room.

    Attributes:
        wanted: bytes that were asked for.
    """

    def __init__(self, wanted: int) -> None:
        super().__init__(wanted)
        self.wanted = wanted


class CacheFolder:
    """Files by name. When room is needed, the least recently used ones are dropped.

    A file that is dropped while a process has it open stays readable there until it is closed. It is not counted then,
    but takes room on the disk: so nobody should keep files open.

    Args:
        path: the folder; made if it is not there.
        limit_bytes: upper bound on the bytes of all files; files that are being fetched count.

    Raises:
        DataError: the folder cannot be made.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)

    def open(self, name: str, size: int | None = None) -> FileIO | None:
        """Open a file; None if it is not there.

        Args:
            name: of the file.
            size: in bytes, if known. A file of another size is dropped. The checksum is not compared again: that was
                done when the file was fetched.
        """
        path = self.path / name
        try:
            with explained(self.path, FileNotFoundError):
                file = FileIO(path)
        except FileNotFoundError:
            return None
        status = os.fstat(file.fileno())
        if size is not None and status.st_size != size:
            file.close()
            self.drop(name)
            return None
        if time.time() - status.st_mtime > _TOUCHED_EVERY_S:
            with suppress(OSError):  # it was dropped meanwhile, or belongs to another user
                os.utime(path)
        return file

    def inode(self, name: str) -> int | None:
        """The inode of a file, which tells it from one that takes its place; None if it is not there."""
        try:
            return (self.path / name).stat().st_ino
        except OSError:
            return None

    def drop_if_damaged(self, name: str, sha256: str | None) -> bool:
        """Compare the bytes of a file with their hex digest, and drop it if they differ; returns whether it was.

        Args:
            name: of the file.
            sha256: hex digest; None: that of the bytes that were fetched. A file that has none is not dropped.
        """
        digest = hashlib.sha256()
        try:
            with FileIO(self.path / name) as file:
                sha256 = sha256 or fetched_digest(file)
                if sha256 is None:
                    return False
                while block := file.read(_BLOCK):
                    digest.update(block)
            damaged = digest.hexdigest() != sha256.lower()
        except FileNotFoundError:
            return False
        except OSError:  # the disk does not give back what was written
            damaged = True
        if damaged:
            with suppress(OSError):
                self.drop(name)
        return damaged

    def drop(self, name: str) -> None:
        """Remove a file, and what is kept beside it."""
        (self.path / name).unlink(missing_ok=True)
        self.drop_beside(name)

    def drop_beside(self, name: str) -> None:
        """Remove what is kept beside a file."""
        for beside in self.path.glob(f".{name}.*.table"):
            beside.unlink(missing_ok=True)

    def read_beside(self, name: str, kind: str) -> bytes | None:
        """What is kept beside a file; None if nothing is."""
        try:
            return (self.path / f".{name}.{kind}.table").read_bytes()
        except FileNotFoundError:
            return None

    def keep_beside(self, name: str, kind: str, content: bytes) -> None:
        """Keep something small beside a file, unless files that are being fetched take the room.

        Args:
            name: of the file.
            kind: of what is kept, in lower case.
            content: of what is kept.

        Raises:
            DataError: the folder cannot be written to.
        """
        with explained(self.path), locked(self.path / ".room.lock"):
            if len(content) > self.limit_bytes or not self._make_room(len(content)):
                return
            path = self.path / f".{name}.{secrets.token_hex(8)}.part"
            try:
                path.write_bytes(content)
                path.replace(self.path / f".{name}.{kind}.table")
            finally:
                path.unlink(missing_ok=True)

    def names(self) -> set[str]:
        """The names of all whole files."""
        with explained(self.path), os.scandir(self.path) as entries:
            return {entry.name for entry in entries if _WHOLE.fullmatch(entry.name)}

    @contextmanager
    def only_one(self, name: str, *, patience_s: float = math.inf) -> Iterator[bool]:
        """Keep other processes and threads from fetching a file while the body runs.

        Args:
            name: of the file.
            patience_s: seconds to wait for another one that is fetching it. The time begins anew with each byte that
                the other one gets. 0: do not wait.

        Yields:
            True if they are kept from it; False if another one is fetching it still.

        Raises:
            DataError: the folder cannot be written to.
        """
        path, began = self.path / f".{name}.lock", time.time()
        while True:
            # A limited wait looks again and again: the kernel knows no time-out for a lock.
            with locked(path, wait=patience_s == math.inf, remove=True) as mine:
                if mine or time.time() - max(began, self._last_byte(name)) >= patience_s:
                    yield mine
                    return
            time.sleep(_POLL_S / 5)

    def _last_byte(self, name: str) -> float:
        """When a byte of a file that is being fetched came last, as `time.time()`; 0 if none is."""
        newest = 0.0
        for partial in self.path.glob(f".{name}.*.part"):
            with suppress(OSError):
                newest = max(newest, partial.stat().st_mtime)
        return newest

    @contextmanager
    def begin(self, name: str, size: int) -> Iterator[PartialFile]:
        """Begin a file with room for ``size`` bytes. Waits while files that others are fetching take the room.

        It is removed at the end, unless :meth:`PartialFile.keep` was called.

        Raises:
            DataError: it could never fit, or the folder cannot be written to.
        """
        self._refuse_too_large(size)
        with explained(self.path):
            partial = self._begin(name, size)
        try:
            yield partial
        finally:
            partial.close()

    def _begin(self, name: str, size: int) -> PartialFile:
        # One waits at a time: otherwise small files could take the room again and again, and a large one wait for ever.
        # Files that are being fetched already need no turn to be finished.
        with locked(self.path / ".turn.lock"):
            while True:
                with locked(self.path / ".room.lock"):
                    if self._make_room(size):
                        path = self.path / f".{name}.{secrets.token_hex(8)}.part"
                        return PartialFile(self, path, self.path / name, size)
                time.sleep(_POLL_S)

    def _make_room(self, size: int, own: Path | None = None) -> bool:
        """Drop the least recently used files until ``size`` bytes fit. Call it with ``.room.lock`` locked.

        Args:
            size: bytes.
            own: a partial file whose bytes do not count: ``size`` is to be its new size.

        Returns:
            False if they cannot fit, because files that are being fetched take the room.
        """
        being_fetched, whole = 0, {}
        beside: dict[str, list[tuple[str, int]]] = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if _WHOLE.fullmatch(entry.name):
                        status = entry.stat()
                        whole[entry.name] = status.st_mtime, status.st_size
                    elif (match := _BESIDE.fullmatch(entry.name)) is not None:
                        beside.setdefault(match[1], []).append((entry.path, entry.stat().st_size))
                    elif _PARTIAL.fullmatch(entry.name) and entry.name != (own and own.name):
                        status = entry.stat()
                        if _is_abandoned(entry.path, status.st_mtime):
                            Path(entry.path).unlink()
                        else:
                            being_fetched += status.st_size
        spare = self.limit_bytes - being_fetched - size
        if spare < 0:
            return False
        for name in beside.keys() - whole.keys():  # it was dropped while they were written
            for path, _ in beside.pop(name):
                Path(path).unlink(missing_ok=True)
        used = sum(bytes_ for _, bytes_ in whole.values()) + sum(
            bytes_ for of_file in beside.values() for _, bytes_ in of_file
        )
        for name, (_, bytes_) in sorted(whole.items(), key=lambda item: item[1]):
            if used <= spare:
                break
            (self.path / name).unlink(missing_ok=True)
            used -= bytes_
            for path, small in beside.get(name, ()):
                Path(path).unlink(missing_ok=True)
                used -= small
        return True

    def _refuse_too_large(self, size: int) -> None:
        if size > self.limit_bytes:
            raise DataError(
                f"{self.path}: a file of {size / 1e9:.3g} GB does not fit into a cache of "
                f"{self.limit_bytes / 1e9:.3g} GB; raise data.cache_gb"
            )


class PartialFile:
    """A file of a cache folder that is being fetched. Made by :meth:`CacheFolder.begin`.

    Args:
        folder: the cache folder.
        path: where it lies until it is whole.
        place: where it will lie.
        room: its size in bytes; it has that size from the beginning.
    """

    def __init__(self, folder: CacheFolder, path: Path, place: Path, room: int) -> None:
        self._folder, self._path, self._place, self._room = folder, path, place, room
        self._file = file_locks.create(path)
        self._file.truncate(room)

    def resize(self, size: int) -> None:
        """Take room for ``size`` bytes in all.

        Raises:
            NoRoom: files that others are fetching take it.
            DataError: it could never fit, or the folder cannot be written to.
        """
        self._folder._refuse_too_large(size)
        with explained(self._folder.path):
            if size > self._room:
                # Without waiting: if two processes waited with half a file each, neither would ever end.
                with locked(self._folder.path / ".room.lock"):
                    if not self._folder._make_room(size, own=self._path):
                        raise NoRoom(size)
                    self._file.truncate(size)
            else:
                self._file.truncate(size)
        self._room = size

    def write(self, block: bytes, at: int) -> None:
        """Write ``block`` at byte ``at``; takes more room if needed, and raises what :meth:`resize` raises."""
        end = at + len(block)
        if end > self._room:
            self.resize(max(end, min(self._room * 3 // 2, self._folder.limit_bytes)))
        with explained(self._folder.path):
            self._file.seek(at)
            self._file.write(block)

    def keep(self, size: int, sha256: str) -> FileIO:
        """Make the first ``size`` bytes, whose hex digest is given, the whole file, and open it.

        Its bytes are on the disk before it has its name: after a power cut a file may otherwise have its size, but
        zeros in place of what it held. It is opened before it has its name, so that nobody can drop it in between.
        """
        with explained(self._folder.path):
            self._file.truncate(size)  # also flushes
            with suppress(OSError):  # not every disk has extended attributes
                os.setxattr(self._file.fileno(), _DIGEST_ATTRIBUTE, sha256.encode())
            os.fsync(self._file.fileno())
            file = FileIO(self._path)
            try:
                self._folder.drop_beside(self._place.name)  # of a file that somebody has removed by hand
                self._path.replace(self._place)
            except OSError:
                file.close()
                raise
        return file

    def close(self) -> None:
        """Remove what was not kept."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        file_locks.release(self._file.fileno(), close=False)
        with suppress(OSError):  # bytes that could not be flushed to a full disk
            self._file.close()


def fetched_digest(file: FileIO) -> str | None:
    """Hex digest of what was fetched; None if the disk could not note it."""
    try:
        return os.getxattr(file.fileno(), _DIGEST_ATTRIBUTE).decode()
    except OSError:
        return None


def _is_abandoned(path: str, modified: float) -> bool:
    """Whether the process that began a partial file has ended; ``modified`` is when it was last written to."""
    try:
        held = file_locks.is_held(path)
    except FileNotFoundError:
        return False
    return time.time() - modified > _SILENT_S if held is None else not held
