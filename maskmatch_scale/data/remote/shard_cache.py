"""Shards on other machines: each is fetched whole into a cache folder on this machine, and read from there.

A shard has its name in the folder only after its bytes were compared with the index. All processes of a machine share
the folder (:mod:`~maskmatch_scale.data.remote.cache_folder`).

``file://`` addresses are cached too: that copies shards from a slow shared disk to a fast local one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from io import FileIO
from pathlib import Path

from maskmatch_scale.data.faults import NotFetched
from maskmatch_scale.data.remote import objects
from maskmatch_scale.data.remote.cache_folder import CacheFolder, NoRoom
from maskmatch_scale.data.remote.fetch import fetch
from maskmatch_scale.data.remote.pipe import refuse_pipe
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.redact import PIPE, shown

_FIRST_ROOM = 1 << 20
"""Bytes reserved for a file whose length is not known yet."""
_PREFETCHES = 4
"""Largest number of prefetches of one process, including those that wait for their turn."""
_PREFETCHES_AT_ONCE = 2


@dataclass(frozen=True)
class Fetched:
    """What a cache has fetched."""

    shards: int = 0
    bytes: int = 0
    seconds: float = 0.0
    """Of all fetches, also of those that failed; those that ran at the same time are added up."""
    failed_tries: int = 0
    damaged: int = 0
    """Shards that were damaged in the cache, and dropped."""
    ranges: int = 0
    """Samples that were read by their range of a shard that was not here yet."""
    left_out: int = 0
    """Samples of shards without an index that were read, and left out by a source's `where`."""

    def __add__(self, other: Fetched) -> Fetched:
        return Fetched(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


NOTHING = Fetched()


class ShardCache:
    """Remote files, kept in a bounded folder that the processes of a machine share.

    A file with a checksum is kept under its checksum, whatever its address. One without is kept under its address
    (with the server that the environment names for an object store) and ETag, and is not fetched again while it is
    there: if what an address holds changes, the file needs one of the two, or another size. Several threads may use one
    object. A pickled or forked copy knows nothing of the prefetches of the original.

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

    def fetch(self, url: str, size: int | None = None, sha256: str | None = None, etag: str | None = None) -> Path:
        """The path of a local file with these bytes.

        Where the cache is full, another process may drop the file at any time; :meth:`open` is safe from that.

        Raises:
            BadSample: see :meth:`open`.
            DataError: see :meth:`open`.
        """
        self.open(url, size, sha256, etag).close()
        return self._folder.path / cached_name(url, sha256, etag)

    def open(
        self,
        url: str,
        size: int | None = None,
        sha256: str | None = None,
        etag: str | None = None,
        *,
        patience_s: float = math.inf,
    ) -> FileIO:
        """Open the file for reading, and fetch it first if it is not there.

        It stays readable if it is dropped, but then takes room on the disk until it is closed: close it soon.

        Args:
            url: an address (:func:`~maskmatch_scale.data.remote.address.is_remote`).
            size: its bytes, if known; compared with what is fetched and with what is in the cache.
            sha256: its hex digest, if known; compared with what is fetched.
            etag: its strong ETag, if known; compared where its server gives one.
            patience_s: seconds in which no byte of it comes, over all tries, before it is given up. 0: it is not
                fetched.

        Raises:
            NotFetched: it cannot be fetched. The message names the address, the tries, the last failure, and what to
                do.
            DataError: it is larger than the cache, the folder cannot be written to, a pipe is not allowed, or a library
                is missing.
        """
        refuse_pipe(url, self.options)
        name = cached_name(url, sha256, etag)
        file = self._folder.open(name, size)
        if file is None:
            if patience_s <= 0:
                raise NotFetched(f"{shown(url)}: not fetched while no other shard can be", may_pass=True)
            asked_at = time.time()
            with self._folder.only_one(name, patience_s=patience_s) as mine:
                if not mine:
                    message = f"{shown(url)}: another process fetches it, but has got nothing for {patience_s:.3g} s"
                    raise NotFetched(f"{message}; check the network and the server, or try later", may_pass=True)
                # Another process may have had the lock before, and fetched the file or failed to.
                file = self._folder.open(name, size)
                if file is None:
                    self._raise_failure_of_others(name, asked_at)
                    file = self._fetch(name, url, size, sha256, etag, patience_s)
                else:
                    self._here().arrivals += 1
        return file

    @property
    def arrivals(self) -> int:
        """How many files have come since this process began; both those that it fetched and those it waited for."""
        return self._here().arrivals

    def inode(self, url: str, sha256: str | None, etag: str | None = None) -> int | None:
        """The inode of the file, which tells it from one that takes its place; None if it is not there."""
        return self._folder.inode(cached_name(url, sha256, etag))

    def drop_if_damaged(self, url: str, sha256: str | None, etag: str | None = None) -> bool:
        """Compare the file that is there with its checksum, and drop it if they differ; returns whether it was.

        Without a checksum it is compared with what was fetched.
        """
        damaged = self._folder.drop_if_damaged(cached_name(url, sha256, etag), sha256)
        if damaged:
            self.count(Fetched(damaged=1))
        return damaged

    def are_here(self, files: Iterable[tuple[str, str | None, str | None]]) -> list[int]:
        """The numbers of those files that are in the cache, of which address, checksum and ETag are given."""
        names = self._folder.names()
        return [number for number, file in enumerate(files) if cached_name(*file) in names]

    def take_figures(self) -> Fetched:
        """What was fetched by this object in this process since the last call."""
        here = self._here()
        with here.lock:
            figures, here.figures = here.figures, Fetched()
        return figures

    def count(self, more: Fetched) -> None:
        """Add to the figures what was fetched without this object, or by it."""
        here = self._here()
        with here.lock:
            here.figures += more

    def _raise_failure_of_others(self, name: str, asked_at: float) -> None:
        # All processes of a rank need the same shard at about the same time: each would go through all tries again.
        failure = self._failure(name)
        try:
            if failure.stat().st_mtime <= asked_at:
                return
            told = json.loads(failure.read_text())
        except (OSError, ValueError):
            return
        raise NotFetched(told["message"], may_pass=told["may_pass"])

    def _failure(self, name: str) -> Path:
        """The file that tells the last failure to those that wait."""
        return self._folder.path / f".{name}.failed"

    def forget(self, url: str, sha256: str | None = None) -> None:
        """Drop a file that is kept under its address or checksum, so that it is fetched again."""
        self._folder.drop(cached_name(url, sha256, None))

    def prefetch(self, url: str, size: int | None = None, sha256: str | None = None, etag: str | None = None) -> bool:
        """Begin to fetch, in the background, a file that will be needed. Never raises and never waits.

        A file that another process is fetching is left to that process.

        Returns:
            Whether the file is there or will be. False: this process has four prefetches under way; ask again later.
        """
        with suppress(Exception):
            here, name = self._here(), cached_name(url, sha256, etag)
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
                    target=self._prefetch, args=(here, name, url, size, sha256, etag), name="prefetch", daemon=True
                ).start()
            except BaseException:
                here.prefetching.discard(name)
                raise
        return True

    def _prefetch(
        self, here: _Process, name: str, url: str, size: int | None, sha256: str | None, etag: str | None
    ) -> None:
        # A failure is not reported here. Whoever needs the file tries again, and reports the failure then.
        try:
            with suppress(Exception), here.turns, self._folder.only_one(name, patience_s=0) as mine:
                if mine and not (self._folder.path / name).exists():
                    self._fetch(name, url, size, sha256, etag, math.inf).close()
        finally:
            here.prefetching.discard(name)

    def _fetch(
        self, name: str, url: str, size: int | None, sha256: str | None, etag: str | None, patience_s: float
    ) -> FileIO:
        """Fetch a file that is not there, and open it. Call it inside ``only_one``."""
        room = size if size is not None else min(_FIRST_ROOM, self.options.limit_bytes)
        began = time.monotonic()
        while True:
            with self._folder.begin(name, room) as partial:
                try:
                    received, digest = fetch(
                        url,
                        partial,
                        size,
                        sha256,
                        self.options,
                        etag=etag,
                        patience_s=patience_s,
                        tried=self._count_failed_try,
                    )
                    file = partial.keep(received, digest)
                except NoRoom as error:
                    room = error.wanted
                    continue
                except NotFetched as error:
                    self.count(Fetched(seconds=time.monotonic() - began))
                    with suppress(OSError):
                        self._failure(name).write_text(json.dumps({"message": str(error), "may_pass": error.may_pass}))
                    raise
            self.count(Fetched(1, received, time.monotonic() - began))
            self._here().arrivals += 1
            self._failure(name).unlink(missing_ok=True)
            return file

    def _count_failed_try(self) -> None:
        self.count(Fetched(failed_tries=1))

    def _here(self) -> _Process:
        if self._process.pid != os.getpid():  # forked: the lock may be held, and the threads are not there
            self._process = _Process()
        return self._process


@dataclass
class _Process:
    """What belongs to one process. A forked one makes its own."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    figures: Fetched = field(default_factory=Fetched)
    arrivals: int = 0
    prefetching: set[str] = field(default_factory=set)
    """Names of the files whose prefetch is under way."""
    turns: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_PREFETCHES_AT_ONCE))


def cached_name(url: str, sha256: str | None, etag: str | None) -> str:
    """Name of a file in the cache folder."""
    if sha256 is not None:
        return f"sha256-{sha256.lower()}"
    server = objects.server(url) if objects.is_object(url) else []
    version = [url, *server, *([] if etag is None else [etag])]
    return f"url-{hashlib.sha256(chr(10).join(version).encode()).hexdigest()}"
