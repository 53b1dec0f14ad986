"""Shards on other machines: each is fetched whole into a cache folder on this machine, and read from there.

A shard has its name in the folder only after its bytes were compared with the index. All processes of a machine share
the folder (:mod:`~maskmatch_scale.data.remote.cache_folder`).

``file://`` addresses are cached too: that copies shards from a slow shared disk to a fast local one.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.remote.cache_folder import CacheFolder, NoRoom
from maskmatch_scale.data.remote.fetch import fetch
from maskmatch_scale.data.remote.pipe import refuse_pipe
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.redact import PIPE

_FIRST_ROOM = 1 << 20
"""Bytes reserved for a file whose length is not known yet."""
_PREFETCHES = 4
"""Largest number of prefetches of one process, including those that wait for their turn."""
_PREFETCHES_AT_ONCE = 2


class ShardCache:
    """Remote files, kept in a bounded folder that the processes of a machine share.

    A file with a checksum is kept under its checksum, whatever its address. One without is kept under its address, and
    is not fetched again while it is there: if what an address holds changes, the file needs a checksum. Several threads
    may use one object. A pickled or forked copy knows nothing of the prefetches of the original.

    Args:
        options: folder and bound of the cache, and how files are fetched.

    Raises:
        DataError: the folder cannot be made.
    """

    def __init__(self, options: FetchOptions) -> None:
        self.options = options
        self._folder = CacheFolder(options.cache, options.limit_bytes)
        self._process = _Process()

    def __reduce__(self) -> tuple[object, ...]:
        return ShardCache, (self.options,)

    def fetch(self, url: str, size: int | None = None, sha256: str | None = None) -> Path:
        """The path of a local file with these bytes.

        Where the cache is full, another process may drop the file at any time; :meth:`open` is safe from that.

        Raises:
            BadSample: see :meth:`open`.
            DataError: see :meth:`open`.
        """
        self.open(url, size, sha256).close()
        return self._folder.path / _name(url, sha256)

    def open(self, url: str, size: int | None = None, sha256: str | None = None) -> BinaryIO:
        """Open the file for reading, and fetch it first if it is not there. It stays readable if it is dropped.

        Args:
            url: an address (:func:`~maskmatch_scale.data.remote.address.is_remote`).
            size: its bytes, if known; compared with what is fetched and with what is in the cache.
            sha256: its hex digest, if known; compared with what is fetched.

        Raises:
            BadSample: ``shard_unreadable``: it cannot be fetched. The message names the address, the tries, the last
                failure, and what to do.
            DataError: it is larger than the cache, the folder cannot be written to, a pipe is not allowed, or a library
                is missing.
        """
        refuse_pipe(url, self.options)
        name = _name(url, sha256)
        file = self._folder.open(name, size)
        if file is None:
            asked_at = time.time()
            with self._folder.only_one(name):
                # Another process may have had the lock before, and fetched the file or failed to.
                file = self._folder.open(name, size)
                if file is None:
                    self._raise_failure_of_others(name, asked_at)
                    file = self._fetch(name, url, size, sha256)
        return file

    def _raise_failure_of_others(self, name: str, asked_at: float) -> None:
        # All processes of a rank need the same shard at about the same time: each would go through all tries again.
        failure = self._failure(name)
        with suppress(OSError):
            if failure.stat().st_mtime > asked_at:
                raise BadSample("shard_unreadable", failure.read_text())

    def _failure(self, name: str) -> Path:
        """The file that tells the last failure to those that wait."""
        return self._folder.path / f".{name}.failed"

    def forget(self, url: str) -> None:
        """Drop a file that is kept under its address, so that it is fetched again."""
        (self._folder.path / _name(url, None)).unlink(missing_ok=True)

    def prefetch(self, url: str, size: int | None = None, sha256: str | None = None) -> bool:
        """Begin to fetch, in the background, a file that will be needed. Never raises and never waits.

        A file that another process is fetching is left to that process.

        Returns:
            Whether the file is there or will be. False: this process has four prefetches under way; ask again later.
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
                # A daemon thread: a run that ends does not wait for it. Other processes remove its partial file.
                threading.Thread(
                    target=self._prefetch, args=(here, name, url, size, sha256), name="prefetch", daemon=True
                ).start()
            except BaseException:
                here.prefetching.discard(name)
                raise
        return True

    def _prefetch(self, here: _Process, name: str, url: str, size: int | None, sha256: str | None) -> None:
        # A failure is not reported here. Whoever needs the file tries again, and reports the failure then.
        try:
            with suppress(Exception), here.turns, self._folder.only_one(name, wait=False) as mine:
                if mine and not (self._folder.path / name).exists():
                    self._fetch(name, url, size, sha256).close()
        finally:
            here.prefetching.discard(name)

    def _fetch(self, name: str, url: str, size: int | None, sha256: str | None) -> BinaryIO:
        """Fetch a file that is not there, and open it. Call it inside ``only_one``."""
        room = size if size is not None else min(_FIRST_ROOM, self.options.limit_bytes)
        while True:
            with self._folder.begin(name, room) as partial:
                try:
                    file = partial.keep(fetch(url, partial, size, sha256, self.options))
                except NoRoom as error:
                    room = error.wanted
                    continue
                except BadSample as error:
                    with suppress(OSError):
                        self._failure(name).write_text(str(error))
                    raise
            self._failure(name).unlink(missing_ok=True)
            return file

    def _here(self) -> _Process:
        if self._process.pid != os.getpid():  # forked: the lock may be held, and the threads are not there
            self._process = _Process()
        return self._process


@dataclass
class _Process:
    """What belongs to one process. A forked one makes its own."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    prefetching: set[str] = field(default_factory=set)
    """Names of the files whose prefetch is under way."""
    turns: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_PREFETCHES_AT_ONCE))


def _name(url: str, sha256: str | None) -> str:
    """Name of a file in the cache folder."""
    return f"sha256-{sha256.lower()}" if sha256 is not None else f"url-{hashlib.sha256(url.encode()).hexdigest()}"
