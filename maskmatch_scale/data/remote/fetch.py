"""Fetch one file, by whatever its address says; try again, after a pause, where a failure may pass."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable
from types import ModuleType

from maskmatch_scale.data.faults import DataError, NotFetched
from maskmatch_scale.data.remote import filesystems, http, objects, pipe
from maskmatch_scale.data.remote.address import is_http, scrubbed
from maskmatch_scale.data.remote.transfer import LEAST_BYTES, FetchOptions, Sink, Transfer, TransferError
from maskmatch_scale.redact import PIPE, shown

_LONGEST_PAUSE_S = 30.0
_SHORTEST_TRY_S = 1.0
"""Seconds that the last try waits for a byte, however little patience is left."""
_MOST_IN_MEMORY = 1 << 30
"""Larger files are not read into memory."""

# Ranks have equal seeds. Pauses drawn from seeded state would be equal too, and all ranks would come back at once.
# Nor may a pause change the random draws of a run.
_jitter = random.SystemRandom()


def fetch(
    url: str,
    sink: Sink,
    size: int | None,
    sha256: str | None,
    options: FetchOptions,
    *,
    etag: str | None = None,
    patience_s: float = math.inf,
    tried: Callable[[], None] = lambda: None,
    in_a_row: bool = False,
    digest: bool = True,
) -> tuple[int, str]:
    """Fetch a whole file.

    Args:
        url: its address.
        sink: where its bytes are written.
        size: the bytes that it must have, or None if that is not known.
        sha256: the hex digest that it must have, or None if that is not known.
        options: time-outs and tries.
        etag: the strong ETag that it must have, if its server gives one; None if that is not known.
        patience_s: when no byte has come for so many seconds, over all tries, there is no other try.
        tried: called after every try that failed.
        in_a_row: whether only tries count that bring nothing further. A file that is read slowly takes hours, in which
            servers close the connection again and again.
        digest: whether the checksum of its bytes is wanted, also where none is expected.

    Returns:
        Its size in bytes, and the hex SHA-256 of its bytes; empty if it is not wanted.

    Raises:
        NotFetched: all tries failed, or one failed in a way that no other try can mend. The message names the address,
            the tries, the last failure, and what to do.
        DataError: a library is missing, or the sink raised it.
    """
    get = _protocol(url).get
    transfer = Transfer(url, sink, size, sha256, options.timeout_s, etag, digest=digest)
    attempt, furthest = 0, 0
    while True:
        attempt += 1
        left_s = patience_s - (time.monotonic() - transfer.advanced_at)
        transfer.timeout_s = min(options.timeout_s, max(left_s, _SHORTEST_TRY_S))
        transfer.begin_try()
        try:
            get(transfer)
            transfer.check_whole()
            break
        except TransferError as error:
            tried()
            if in_a_row and transfer.furthest >= furthest + LEAST_BYTES:
                attempt, furthest = 1, transfer.furthest
            left_s = patience_s - (time.monotonic() - transfer.advanced_at)
            if error.final or attempt >= options.attempts or left_s <= 0:
                raise _given_up(url, attempt, error) from None
            pause = min(max(_backoff(attempt, options.timeout_s), error.wait_s), left_s)
        time.sleep(pause)
    return transfer.received, transfer.digest


def _protocol(url: str) -> ModuleType:
    if url.startswith(PIPE):
        return pipe
    if is_http(url):
        return http
    return objects if objects.is_object(url) else filesystems


def read_bytes(url: str, options: FetchOptions) -> bytes:
    """Fetch a small file, such as an index, into memory; it is not cached.

    Raises:
        DataError: it cannot be fetched; names the address, the tries, the last failure, and what to do.
    """
    try:
        return fetch_bytes(url, options)
    except NotFetched as error:
        raise DataError(str(error)) from None


def fetch_bytes(url: str, options: FetchOptions) -> bytes:
    """As :func:`read_bytes`, for those who must know whether there is no such file.

    Raises:
        NotFetched: it cannot be fetched; its `may_pass` says whether it may be later.
    """
    pipe.refuse_pipe(url, options)
    memory = _Memory(url)
    size, _ = fetch(url, memory, None, None, options, digest=False)
    return bytes(memory.data[:size])


def has_ranges(url: str) -> bool:
    """Whether :func:`read_range` can be tried: at an HTTP server or an object store."""
    return is_http(url) or objects.is_object(url)


def read_range(url: str, start: int, stop: int, size: int | None, etag: str | None, timeout_s: float) -> bytes:
    """Bytes of a file, in one try; see :func:`maskmatch_scale.data.remote.http.read_range`.

    Raises:
        TransferError: they did not come, or are of another file.
        DataError: a library is missing.
    """
    ask = http.read_range if is_http(url) else objects.read_range
    return ask(url, start, stop, size, etag, timeout_s)


def ask_size(url: str, options: FetchOptions) -> tuple[int | None, str | None]:
    """Size in bytes and strong ETag of a file, without fetching it; None for what is not said.

    Only HTTP servers are asked.

    Raises:
        NotFetched: there is no such file, or its server does not answer.
    """
    for attempt in itertools.count(1) if is_http(url) else ():
        try:
            return http.head(url, options.timeout_s)
        except TransferError as error:
            if error.final or attempt >= options.attempts:
                raise _given_up(url, attempt, error) from None
            time.sleep(max(_backoff(attempt, options.timeout_s), error.wait_s))
    return None, None


def _given_up(url: str, attempt: int, error: TransferError) -> NotFetched:
    tries = "once" if attempt == 1 else f"{attempt} times"
    return NotFetched(
        f"{shown(url)}: tried {tries} and failed: {scrubbed(str(error), url)}; "
        f"{error.advice or 'check the network and the server, or try later'}",
        may_pass=not error.final,
    )


class _Memory:
    """The bytes of a small file, in memory."""

    def __init__(self, url: str) -> None:
        self.data = bytearray()
        self._url = url

    def resize(self, size: int) -> None:
        """Refuse a file that is too large."""
        if size > _MOST_IN_MEMORY:
            raise DataError(
                f"{shown(self._url)}: {size / 1e9:.3g} GB is too large to be read into memory; is it a shard?"
            )

    def write(self, block: bytes, at: int) -> None:
        """Write ``block`` at byte ``at``, and drop what was behind."""
        self.resize(at + len(block))
        self.data[at:] = block


def _backoff(attempt: int, timeout_s: float) -> float:
    """Seconds before the next try: drawn between 0 and a bound that doubles from try to try ("full jitter")."""
    return _jitter.uniform(0, min(_LONGEST_PAUSE_S, min(1.0, timeout_s / 10) * 2.0 ** (min(attempt, 16) - 1)))
