"""Shards that live elsewhere: fetched whole into a cache, and read from there.

A shard is fetched (:mod:`maskmatch_scale.data.remote.fetch`) into a folder that all processes of a machine share
(:mod:`maskmatch_scale.data.remote.cache_folder`). It is there under its name only after its bytes were compared with
the index.

``file://`` counts as elsewhere too: a slow shared disk's shards are copied to a fast local one that way.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.remote.address import PIPE, shown
from maskmatch_scale.data.remote.cache_folder import CacheFolder, NoRoom
from maskmatch_scale.data.remote.fetch import Remote, Transfer, refuse_pipe

_MOST_IN_MEMORY = 1 << 30
_FIRST_ROOM = 1 << 20
"""Bytes reserved for a file whose length is not known yet."""
_PREFETCHES = 4
_PREFETCHES_AT_ONCE = 2


def read_bytes(url: str, options: Remote) -> bytes:
    """A small file, such as an index; it is not cached.

    Raises:
        DataError: it cannot be had; names the address, the tries, the last failure, and what to do.
    """
    refuse_pipe(url, options)
    memory = _Memory(url)
    transfer = Transfer(url, memory, None, None, options)
    try:
        transfer.run(lambda: None)
    except BadSample as error:
        raise DataError(str(error)) from None
    return bytes(memory.data[: transfer.received])


@dataclass
class Figures:
    """What a cache did in this process, threads together."""

    hits: int = 0
    """Files that were there, or that another process or the background had brought."""
    files: int = 0
    """Files fetched."""
    bytes_downloaded: int = 0
    """Bytes received, those thrown away included."""
    seconds: float = 0.0
    """Spent fetching, pauses included; fetches that ran side by side count each."""
    retries: int = 0
    """Tries beyond the first of a file."""
    failures: int = 0
    """Files given up."""


class ShardCache:
    """Files from elsewhere, kept in a bounded folder that the processes of a machine share.

    A file with a checksum is kept under it, wherever it came from. One without is kept under its address, and not asked
    for again until it is dropped: addresses whose contents change need a checksum. One object may be used by several
    threads; pickled or forked, it starts anew.

    Raises:
        DataError: the folder cannot be made.
    """

    def __init__(self, options: Remote) -> None:
        self.options = options
        self._folder = CacheFolder(options.cache, options.limit_bytes)
        self._process = _Process()

    def __reduce__(self) -> tuple[object, ...]:
        return ShardCache, (self.options,)

    @property
    def figures(self) -> Figures:
        """What was done so far by this object in this process (a copy)."""
        return replace(self._here().figures)

    def fetch(self, url: str, size: int | None = None, sha256: str | None = None) -> Path:
        """A local file with these bytes. Others may drop it at any time where the cache is full: rather use `open`.

        Raises:
            as :meth:`open` does.
        """
        self.open(url, size, sha256).close()
        return self._folder.path / _name(url, sha256)

    def open(self, url: str, size: int | None = None, sha256: str | None = None) -> BinaryIO:
        """The file, open for reading; it stays readable when it is dropped from the cache.

        Args:
            url: an address (:func:`is_remote`).
            size: its bytes, if known; compared with what comes and with what lies in the cache.
            sha256: hex digest, if known; compared with what comes.

        Raises:
            BadSample: ``shard_unreadable``: it cannot be had; names the address, the tries, the last failure, and what
                to do.
            DataError: it is larger than the cache, the folder cannot be written to, a pipe is not allowed, or a library
                is missing.
        """
        refuse_pipe(url, self.options)
        name = _name(url, sha256)
        file = self._found(name, size)
        if file is None:
            asked = time.time()
            with self._folder.only_one(name):
                # Whoever had the lock may have brought it, or tried in vain.
                file = self._found(name, size)
                if file is None:
                    self._raise_what_others_met(name, asked)
                    file = self._download(name, url, size, sha256)
        return file

    def _raise_what_others_met(self, name: str, asked: float) -> None:
        # All processes of a rank want the same shard at about the same time: each would try it through anew.
        failure = self._failure(name)
        with suppress(OSError):
            if failure.stat().st_mtime > asked:
                raise BadSample("shard_unreadable", failure.read_text())

    def _failure(self, name: str) -> Path:
        """Where the last failure of a file is told to those that wait for it."""
        return self._folder.path / f".{name}.failed"

    def forget(self, url: str) -> None:
        """Drop a file that is kept under its address, to fetch it anew."""
        (self._folder.path / _name(url, None)).unlink(missing_ok=True)

    def prefetch(self, url: str, size: int | None = None, sha256: str | None = None) -> bool:
        """Begin to fetch a file that will be needed, in the background. Never raises and never waits.

        What another process is fetching is left to it.

        Returns:
            Whether it is there or will be; False: four files are under way here, ask again later.
        """
        with suppress(Exception):
            here, name = self._here(), _name(url, sha256)
            if (self._folder.path / name).exists() or (url.startswith(PIPE) and not self.options.allow_pipe):
                return True
            with here.lock:
                if name in here.prefetching:
                    return True
                if len(here.prefetching) >= _PREFETCHES:
                    return False
                here.prefetching.add(name)
            try:
                # A daemon: a run that ends does not wait for it, and its leftovers are swept up by others.
                threading.Thread(
                    target=self._prefetch, args=(here, name, url, size, sha256), name="prefetch", daemon=True
                ).start()
            except BaseException:
                here.prefetching.discard(name)
                raise
        return True

    def _prefetch(self, here: _Process, name: str, url: str, size: int | None, sha256: str | None) -> None:
        # Its failure is not told: whoever needs the file tries again, and says so.
        try:
            with suppress(Exception), here.turns, self._folder.only_one(name, wait=False) as mine:
                if mine and not (self._folder.path / name).exists():
                    self._download(name, url, size, sha256).close()
        finally:
            here.prefetching.discard(name)

    def _found(self, name: str, size: int | None) -> BinaryIO | None:
        file = self._folder.open(name, size)
        if file is not None:
            self._count(hits=1)
        return file

    def _download(self, name: str, url: str, size: int | None, sha256: str | None) -> BinaryIO:
        room = size if size is not None else min(_FIRST_ROOM, self.options.limit_bytes)
        began = time.monotonic()
        try:
            while True:
                with self._folder.begin(name, room) as part:
                    transfer = Transfer(url, part, size, sha256, self.options)
                    try:
                        transfer.run(lambda: self._count(retries=1))
                        file = part.keep(transfer.received)
                    except NoRoom as error:
                        room = error.wanted
                        continue
                    finally:
                        self._count(bytes_downloaded=transfer.bytes_read)
                self._count(files=1)
                self._failure(name).unlink(missing_ok=True)
                return file
        except DataError as error:
            self._count(failures=1)
            if isinstance(error, BadSample):
                with suppress(OSError):
                    self._failure(name).write_text(str(error))
            raise
        finally:
            self._count(seconds=time.monotonic() - began)

    def _here(self) -> _Process:
        if self._process.pid != os.getpid():  # forked: a lock may have been held and threads are gone
            self._process = _Process()
        return self._process

    def _count(self, **more: float) -> None:
        here = self._here()
        with here.lock:
            for name, value in more.items():
                setattr(here.figures, name, getattr(here.figures, name) + value)


@dataclass
class _Process:
    """What belongs to one process and is made anew in a forked one."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    figures: Figures = field(default_factory=Figures)
    prefetching: set[str] = field(default_factory=set)
    turns: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_PREFETCHES_AT_ONCE))


class _Memory:
    """Bytes in memory, of files that are small."""

    def __init__(self, url: str) -> None:
        self.data = bytearray()
        self._url = url

    def resize(self, size: int) -> None:
        if size > _MOST_IN_MEMORY:
            raise DataError(f"{shown(self._url)}: {size / 1e9:.3g} GB is too large for an index; is it a shard?")

    def write(self, block: bytes, at: int) -> None:
        self.resize(at + len(block))
        self.data[at:] = block


def _name(url: str, sha256: str | None) -> str:
    """Name in the cache."""
    return f"sha256-{sha256.lower()}" if sha256 is not None else f"url-{hashlib.sha256(url.encode()).hexdigest()}"
