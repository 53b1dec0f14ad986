"""One file that is being fetched: the bytes that have arrived, over all tries, and the checks on them.

:mod:`~maskmatch_scale.data.remote.fetch` starts the tries. A protocol (:mod:`~maskmatch_scale.data.remote.http`,
:mod:`~maskmatch_scale.data.remote.objects`, :mod:`~maskmatch_scale.data.remote.filesystems`,
:mod:`~maskmatch_scale.data.remote.pipe`) brings the bytes of one try.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

LEAST_BYTES = 256 << 10
"""A transfer that moves fewer bytes than this within the time-out counts as stalled."""
_OTHER_BYTES = "if this happens again, upload the shard again or write the index anew"


@dataclass(frozen=True)
class FetchOptions:
    """How files are fetched; picklable."""

    cache: Path
    """Folder of the cache."""
    limit_bytes: int
    """Upper bound of the bytes in the cache. Files that are still being fetched count."""
    timeout_s: float
    """Seconds to wait for a connection or for the next byte. Less than 256 KiB in this time is a stall too."""
    attempts: int
    """Tries per file."""
    allow_pipe: bool = False
    """Whether ``pipe:COMMAND`` may run its command."""


class TransferError(Exception):
    """One try has failed; there is another unless this is final.

    Args:
        message: what went wrong.
        advice: what the user can do; empty: general advice about networks is given.
        final: whether another try would fail in the same way.
        wait_s: seconds that the server asks to wait before the next try.
        restart: whether the bytes that have arrived are of no use: the file is another one by now.
    """

    def __init__(
        self, message: str, advice: str = "", *, final: bool = False, wait_s: float = 0.0, restart: bool = False
    ) -> None:
        super().__init__(message)
        self.advice, self.final, self.wait_s, self.restart = advice, final, wait_s, restart


class NoRanges(TransferError):  # noqa: N818 - named after what it is about
    """The server answers, with the whole file: it does not send parts."""


@dataclass(frozen=True)
class Body:
    """A file from one of its bytes on, as one try reads it."""

    size: int
    """Bytes of the whole file."""
    version: str | None
    """What tells this version of the file from another one (an ETag)."""
    blocks: Iterator[bytes]
    """What follows, as it arrives. Raises TransferError."""


class Sink(Protocol):
    """Where the bytes of a file are written. What a method raises ends the transfer, and nothing is tried again."""

    def resize(self, size: int) -> None:
        """The file will have ``size`` bytes."""

    def write(self, block: bytes, at: int) -> None:
        """Write ``block`` at byte ``at``, over what was there."""


class Transfer:
    """The bytes of one file that have arrived so far. They are kept from try to try where a source can send the rest.

    Args:
        url: address of the file.
        sink: where its bytes are written.
        size: the bytes that it must have, or None if that is not known.
        sha256: the hex digest that it must have, or None if that is not known.
        timeout_s: seconds; see :class:`FetchOptions`.
        etag: the strong ETag that it must have, or None if that is not known; looked at where a source says one.
        digest: whether `digest` is wanted, also if ``sha256`` is None.
    """

    def __init__(
        self,
        url: str,
        sink: Sink,
        size: int | None,
        sha256: str | None,
        timeout_s: float,
        etag: str | None = None,
        *,
        digest: bool = True,
    ) -> None:
        self.url, self.timeout_s = url, timeout_s
        self._etag = etag
        self.advanced_at = time.monotonic()
        """When bytes came last, not counting those that trickle."""
        self.furthest = 0
        """Most bytes that have arrived by the end of any try."""
        self._sink, self._size, self._sha256 = sink, size, sha256
        self._with_digest = digest or sha256 is not None
        self.restart()

    def restart(self) -> None:
        """Discard what has arrived: the next byte is the first of the file."""
        self.received = 0
        """Bytes that have arrived."""
        self.version: str | None = None
        """What tells this version of the file from another one (an ETag), if the source says so."""
        self._total = self._size
        self._digest = hashlib.sha256() if self._with_digest else None

    def begin_try(self) -> None:
        """Prepare for the next try. Keep what the last one brought if the rest can be told to be of the same file."""
        if self._sha256 is None and self.version is None:
            self.restart()
        self._marked_at, self._since_mark = math.inf, 0

    def expect(self, total: int) -> None:
        """Note how many bytes the file has, as the source says.

        Raises:
            TransferError: another number is expected.
        """
        if self._total is not None and total != self._total:
            expected = self._total
            self.restart()
            raise TransferError(f"{total} bytes where {expected} are expected", _OTHER_BYTES)
        self._total = total
        self._sink.resize(total)

    def expect_version(self, etag: str | None) -> None:
        """Note the strong ETag of the file, as the source says; None: it says none.

        Raises:
            TransferError: another one is expected.
        """
        self.version = etag
        if self._etag is not None and etag is not None and etag != self._etag:
            self.restart()
            raise TransferError(
                f"its ETag is {etag} where the index says {self._etag}",
                "the file has changed: index it again (`maskmatch shards index … --rescan`)",
                final=True,
            )

    @property
    def digest(self) -> str:
        """Hex SHA-256 of what has arrived; empty if it is not wanted."""
        return self._digest.hexdigest() if self._digest else ""

    def write(self, block: bytes) -> None:
        """Take the next bytes of the file.

        Raises:
            TransferError: they are too many, or come too slowly.
        """
        if self._total is not None and self.received + len(block) > self._total:
            expected = self._total
            self.restart()
            raise TransferError(f"more than the {expected} bytes that are expected", _OTHER_BYTES)
        began = time.monotonic()
        self._marked_at = min(self._marked_at, began)
        self._sink.write(block, self.received)
        now = time.monotonic()
        # A sink may keep the source waiting for as long as it likes: that is no stall of the source.
        self.advanced_at += now - began
        self._marked_at += now - began
        if self._digest is not None:
            self._digest.update(block)
        self.received += len(block)
        self.furthest = max(self.furthest, self.received)
        self._since_mark += len(block)
        if self._since_mark >= LEAST_BYTES:
            self.advanced_at = self._marked_at = now
            self._since_mark = 0
        elif now - self._marked_at > self.timeout_s and self.received != self._total:
            raise TransferError(f"stalled: {self._since_mark} bytes in {now - self._marked_at:.3g} s")

    def check_whole(self) -> None:
        """Compare the file, which has ended, with its size and checksum.

        Raises:
            TransferError: bytes are missing, or the checksum is another one.
        """
        if self._total is not None and self.received < self._total:
            raise TransferError(f"cut after {self.received} of {self._total} bytes")
        if self._sha256 is not None and self.digest != self._sha256.lower():
            self.restart()
            raise TransferError("its bytes are not those the index has the checksum of", _OTHER_BYTES)
