"""A file read in sequence while it comes: each byte is fetched once, and nothing is kept on the disk.

A thread fetches (:mod:`~maskmatch_scale.data.remote.fetch`), with the tries, time-outs and messages of all fetches,
and stays a bounded number of bytes ahead of the reader. A server that closes the connection meanwhile is asked for
the rest. Where a source can only send a file from its beginning again, that is compared with what had been read.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from pathlib import Path
from typing import Protocol
from zlib import crc32

from maskmatch_scale.data.faults import BadSample, NotFetched
from maskmatch_scale.data.remote.fetch import fetch
from maskmatch_scale.data.remote.pipe import refuse_pipe
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.redact import is_remote, shown

_AHEAD_BYTES = 8 << 20
"""How far a thread fetches ahead of its reader."""


class Readable(Protocol):
    """Bytes in sequence."""

    def read(self, size: int, /) -> bytes | memoryview:
        """At most ``size`` bytes, and none at the end only."""

    def close(self) -> None:
        """Read no further."""


def open_stream(location: str, options: FetchOptions, *, patience_s: float = math.inf) -> Readable:
    """Open a file for reading from its first byte to its last.

    Args:
        location: a path or an address (:mod:`~maskmatch_scale.data.remote.address`).
        options: time-outs and tries.
        patience_s: seconds in which no byte comes, over all tries, before a remote file is given up. 0: it is not
            fetched.

    Raises:
        BadSample: it is local and cannot be opened; or see :class:`RemoteStream`.
    """
    if is_remote(location):
        return RemoteStream(location, options, patience_s=patience_s)
    path = Path(location)
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            raise FileNotFoundError(2, "no such file")
        return path.open("rb")
    except OSError as error:
        raise BadSample("shard_unreadable", f"{location}: {error.strerror}; write the shard again") from None


class RemoteStream:
    """A remote file in sequence. One thread may read it.

    Args:
        url: its address.
        options: time-outs and tries. Tries count in a row: one that brings more of the file begins the count anew.
        patience_s: see :func:`open_stream`.

    Raises:
        NotFetched: there is no patience.
        DataError: a pipe is not allowed.
    """

    def __init__(self, url: str, options: FetchOptions, *, patience_s: float = math.inf) -> None:
        refuse_pipe(url, options)
        if patience_s <= 0:
            raise NotFetched(f"{shown(url)}: not fetched while no other shard can be", may_pass=True)
        self.failed_tries = 0
        """Tries that have failed so far."""
        self.received = 0
        """Bytes that have come so far, without those that came again."""
        self.seconds = 0.0
        """That the thread has spent on fetching, not counting those in which it waited for the reader."""
        self._url, self._options, self._patience_s = url, options, patience_s
        self._changed = threading.Condition()
        self._blocks: deque[memoryview] = deque()
        self._held = 0
        self._sum, self._sum_again = 0, 0
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._resumed_at = time.monotonic()
        # A daemon thread: a process that ends does not wait for it.
        threading.Thread(target=self._fetch, name="shard stream", daemon=True).start()

    def read(self, size: int, /) -> memoryview:
        """At most ``size`` bytes, and none at the end only. It waits until some have come.

        Raises:
            NotFetched: the rest cannot be fetched.
            DataError: a library is missing.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._blocks or self._ended)
            if not self._blocks:
                if self._error is not None:
                    raise self._error
                return memoryview(b"")
            block = self._blocks.popleft()
            if len(block) > size:
                self._blocks.appendleft(block[size:])
                block = block[:size]
            self._held -= len(block)
            if self._held <= _AHEAD_BYTES:  # the thread need not wake before
                self._changed.notify_all()
            return block

    def close(self) -> None:
        """End the fetch. What has come and was not read is dropped."""
        with self._changed:
            self._closed = True
            self._blocks.clear()
            self._changed.notify_all()

    def resize(self, size: int) -> None:
        """The file will have ``size`` bytes: nothing follows from that here."""

    def write(self, block: bytes, at: int) -> None:
        """Take the bytes that come at ``at``; wait until the reader needs more."""
        with self._changed:
            if at < self.received:
                again, block = block[: self.received - at], block[self.received - at :]
                self._sum_again = crc32(again, self._sum_again if at else 0)
                if at + len(again) == self.received and self._sum_again != self._sum:
                    raise NotFetched(
                        f"{shown(self._url)}: it was changed while it was read; leave shards of a run as they are",
                        may_pass=False,
                    )
            if block:
                self._sum = crc32(block, self._sum)
                self.received += len(block)
                self._held += len(block)
                self._blocks.append(memoryview(block))
                self._changed.notify_all()
            self.seconds += time.monotonic() - self._resumed_at
            self._changed.wait_for(lambda: self._held <= _AHEAD_BYTES or self._closed)
            self._resumed_at = time.monotonic()
            if self._closed:
                raise _ClosedError

    def _fetch(self) -> None:
        try:
            fetch(
                self._url,
                self,
                None,
                None,
                self._options,
                patience_s=self._patience_s,
                tried=self._count_failed_try,
                in_a_row=True,
                digest=False,
            )
        except _ClosedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self.seconds += time.monotonic() - self._resumed_at
                self._ended = True
                self._changed.notify_all()

    def _count_failed_try(self) -> None:
        self.failed_tries += 1
        if self._closed:
            raise _ClosedError


class _ClosedError(Exception):
    """Nobody reads the stream any more."""
