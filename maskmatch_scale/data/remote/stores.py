"""Object stores (S3, Google Cloud Storage, Azure), by obstore, in this process.

Objects are read in a single try: further ones are :mod:`~maskmatch_scale.data.remote.fetch`'s. Ask
:mod:`~maskmatch_scale.data.remote.objects`, which knows whether obstore may be used in this process.

An object is read as ranges, several at a time, because stores limit the bytes a second of one connection. All ranges
are of one version: with each of them the store is given the ETag that came with the first.

Decision: docs/decisions/0065-object-stores-by-obstore.md.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote.store_errors import PREFIXES, STORES, transfer_error
from maskmatch_scale.data.remote.transfer import Body, TransferError
from maskmatch_scale.redact import shown

if TYPE_CHECKING:
    from obstore.store import ObjectStore

RANGE = 8 << 20
"""Bytes of one range."""
_RANGES_AT_ONCE = 4
_LISTED_AT_ONCE = 1000
_LIST_TRIES = 6
"""Tries for each part of a list. The pauses between them double, up to 15 s."""
_ADDRESS = re.compile(r"(?P<scheme>\w+)://(?P<root>[^/?#]+)(?:/(?P<key>.*))?", re.DOTALL)
_CLIENT_KEYS = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_excludes", "proxy_ca_certificate")
"""What obstore would read from the environment (`AWS_ALLOW_HTTP`) if it were given no time-outs."""

_stores: dict[str, tuple[float, ObjectStore]] = {}
"""By root, such as ``s3://bucket``: time-out in seconds, and the store, which keeps connections and credentials."""
_state = {"used": False, "lost": False}


def _in_child() -> None:
    _state["lost"] |= _state["used"]


os.register_at_fork(after_in_child=_in_child)


def are_lost() -> bool:
    """Whether obstore was used before this process was forked. Its threads are not here, and calls never return."""
    return _state["lost"]


@contextmanager
def reading(url: str, start: int, version: str | None, timeout_s: float, stop: int | None = None) -> Iterator[Body]:
    """Open an object, and read it from a byte on.

    Args:
        url: ``s3://bucket/key``, ``gs://bucket/key``, ``az://container/key``, …
        start: the first byte that is wanted.
        version: the ETag that the object must have, if it is known.
        timeout_s: seconds to wait for a connection and for the next byte.
        stop: the byte after the last one that is wanted; None: that after the last one of the object.

    Raises:
        TransferError: the try has failed.
        DataError: obstore is not installed.
    """
    store, key = _open(url, timeout_s)
    first_stop = start + RANGE if stop is None else min(start + RANGE, stop)
    ranges = deque([_Range(store, url, key, start, first_stop, version)])
    try:
        try:
            about = ranges[0].next(timeout_s)
        except TransferError as error:
            if start or not error.restart:
                raise
            # An empty object has no first byte: the store refuses the range.
            about = _Head(store, url, key).next(timeout_s)
            if about["size"]:
                raise
        size, etag = about["size"], about["e_tag"]
        if version is not None:
            _check_version(etag, version)
        end = size if stop is None else min(stop, size)
        later = (_Range(store, url, key, at, min(at + RANGE, end), etag) for at in range(start + RANGE, end, RANGE))
        yield Body(size, etag, _blocks(ranges, later, end, etag, timeout_s) if size else iter(()))
    finally:
        for unread in ranges:
            unread.unwanted = True


def _check_version(etag: str | None, version: str | None) -> None:
    """Raise a TransferError if a store has answered with another version, although it was given the ETag."""
    if etag != version:
        raise TransferError("it has changed since its first bytes came", restart=True)


def _blocks(
    ranges: deque[_Range], later: Iterator[_Range], end: int, etag: str | None, timeout_s: float
) -> Iterator[bytes]:
    """The blocks of all ranges in order.

    Args:
        ranges: those that are being read; it is filled up from ``later``. What the store says about the object has been
            taken from the first of them.
        later: those that follow.
        end: the byte after the last one that is wanted.
        etag: its version.
        timeout_s: see :func:`reading`.
    """
    is_first = True
    while True:
        while len(ranges) < _RANGES_AT_ONCE and (another := next(later, None)) is not None:
            ranges.append(another)
        if not ranges:
            return
        if not is_first:
            _check_version(ranges[0].next(timeout_s)["e_tag"], etag)
        is_first = False
        missing = min(ranges[0].end, end) - ranges[0].start
        while (block := ranges[0].next(timeout_s)) is not None:
            missing -= len(block)
            yield block
        if missing:
            raise TransferError("the connection was cut")
        ranges.popleft()


class Found(NamedTuple):
    """An object that a store lists."""

    url: str
    bytes: int
    version: str | None
    """Its ETag."""


def listing(url: str, timeout_s: float) -> Iterator[list[Found]]:
    """All objects below a folder, also those in folders within it, some at a time, in no order.

    Args:
        url: of the folder, or of a whole bucket.
        timeout_s: seconds to wait for a connection and for the next byte.

    Raises:
        TransferError: the try has failed.
        DataError: obstore is not installed.
    """
    root, folder = _cut(url)
    # Here obstore tries again, where a store refuses a part of the list for a while.
    store = _new_store(url, root, timeout_s, tries=_LIST_TRIES)
    import obstore

    root = url[: len(url) - len(folder)].rstrip("/")  # as it was given
    try:
        for some in obstore.list(store, folder.rstrip("/") or None, chunk_size=_LISTED_AT_ONCE):
            yield [Found(f"{root}/{about['path']}", about["size"], about["e_tag"]) for about in some]
    except BaseException as error:  # also obstore's PanicException, which is no Exception
        raise transfer_error(error, url) from None


class _Answer:
    """What a store answers. A thread takes it, which is left behind if the store hangs."""

    def __init__(self, store: ObjectStore, url: str, key: str) -> None:
        self.unwanted = False
        """Whether nothing more of it is needed."""
        self._store, self._url, self._key = store, url, key
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._take, name="obstore", daemon=True).start()

    def next(self, timeout_s: float) -> Any:
        """The next item: first what the store says about the object, then blocks, at last None.

        Raises:
            TransferError: there is none.
        """
        try:
            item = self._items.get(timeout=timeout_s)
        except queue.Empty:
            raise TransferError(f"stalled: no byte in {timeout_s:g} s") from None
        if isinstance(item, BaseException):
            raise transfer_error(item, self._url)
        return item

    def _take(self) -> None:
        try:
            for item in self._ask():
                if self.unwanted:
                    return
                self._items.put(item)
            self._items.put(None)
        except BaseException as error:  # also obstore's PanicException
            self._items.put(error)

    def _ask(self) -> Iterator[Any]:
        raise NotImplementedError


class _Head(_Answer):
    """Nothing but what the store says about an object."""

    def _ask(self) -> Iterator[Any]:
        import obstore

        yield obstore.head(self._store, self._key)


class _Range(_Answer):
    """Bytes ``start`` to ``end`` of an object, which may end before, if it has this version (None: any)."""

    def __init__(self, store: ObjectStore, url: str, key: str, start: int, end: int, version: str | None) -> None:
        self.start, self.end, self._version = start, end, version
        super().__init__(store, url, key)

    def _ask(self) -> Iterator[Any]:
        import obstore

        options: Any = {"range": (self.start, self.end)}
        if self._version is not None:
            options["if_match"] = self._version
        answer = obstore.get(self._store, self._key, options=options)
        yield answer.meta
        # Blocks as they come: if the connection is cut, what came of a larger one would be lost.
        yield from answer.stream(min_chunk_size=1)


def _open(url: str, timeout_s: float) -> tuple[ObjectStore, str]:
    """The store of an address, which makes one try, and the key in it."""
    root, key = _cut(url)
    # A store may wait longer than who reads from it. A new store would have no connections yet.
    known = _stores.get(root)
    if known is None or known[0] < timeout_s:
        known = _stores[root] = timeout_s, _new_store(url, root, timeout_s, tries=1)
    return known[1], key


def _cut(url: str) -> tuple[str, str]:
    """Split an address into that of the bucket or container, and the key, which is not escaped in an address."""
    match = _ADDRESS.fullmatch(url)
    if match is None:
        raise TransferError("not a valid address", "write s3://bucket/folder/x.tar", final=True)
    scheme = match["scheme"].lower()
    return f"{'gs' if scheme == 'gcs' else scheme}://{match['root']}", match["key"] or ""  # obstore knows no gcs://


def _new_store(url: str, root: str, timeout_s: float, tries: int) -> ObjectStore:
    scheme = url.partition("://")[0].lower()
    try:
        import obstore.store
    except ImportError:
        raise DataError(
            f"{shown(url)}: {scheme}:// needs obstore, which is not installed; "
            f"pip install 'maskmatch_scale[{STORES[scheme]}]'"
        ) from None
    _state["used"] = True
    os.environ.setdefault("TOKIO_WORKER_THREADS", "2")  # otherwise one a core, in each loader process
    try:
        return obstore.store.from_url(
            root, client_options=_client_options(scheme, timeout_s), retry_config={"max_retries": tries - 1}
        )
    except BaseException as error:  # also obstore's PanicException
        raise transfer_error(error, url) from None


def _client_options(scheme: str, timeout_s: float) -> Any:
    prefix = PREFIXES[STORES[scheme]]
    given = {key: os.environ.get(f"{prefix}_{key.upper()}") for key in _CLIENT_KEYS}
    wait = timedelta(seconds=timeout_s)
    return {
        **{key: value for key, value in given.items() if value is not None},
        "connect_timeout": wait,
        "read_timeout": wait,
        "timeout": timedelta(days=365),  # of a whole request: none
    }
