"""Files in object stores: ``s3://``, ``gs://``, ``az://`` and their other names."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from maskmatch_scale.data.remote import store_process, stores
from maskmatch_scale.data.remote.store_errors import STORES
from maskmatch_scale.data.remote.transfer import Body, Transfer, TransferError

_SERVERS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gcs": ("GOOGLE_BASE_URL",),
    "azure": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURE_STORAGE_USE_EMULATOR"),
}
"""By kind of store, the variables of the environment that say at which server an address is."""


def server(url: str) -> list[str]:
    """At which server the address of an object is, as far as the environment says it and not the address."""
    names = _SERVERS[STORES[url.partition("://")[0].lower()]]
    return [f"{name}={value}" for name in names if (value := os.environ.get(name))]


def is_object(url: str) -> bool:
    """Whether an address is one of an object store."""
    return url.partition("://")[0].lower() in STORES


def get(transfer: Transfer) -> None:
    """Fetch what is missing of a file, in one try.

    Raises:
        TransferError: the try has failed.
        DataError: obstore is not installed.
    """
    try:
        with reading(transfer.url, transfer.received, transfer.version, transfer.timeout_s) as body:
            transfer.expect(body.size)
            transfer.expect_version(body.version)
            for block in body.blocks:
                transfer.write(block)
    except TransferError as error:
        if error.restart:
            transfer.restart()
        raise


def read_range(url: str, start: int, stop: int, size: int | None, etag: str | None, timeout_s: float) -> bytes:
    """Bytes ``start`` to ``stop`` of an object; see :func:`maskmatch_scale.data.remote.http.read_range`.

    Raises:
        TransferError: the request has failed, or the object is another one.
        DataError: obstore is not installed.
    """
    due = time.monotonic() + timeout_s
    data = bytearray()
    with reading(url, start, etag, timeout_s, stop) as body:
        if size is not None and body.size != size:
            raise TransferError("it has changed")
        for block in body.blocks:
            data += block
            if time.monotonic() > due:
                raise TransferError(f"stalled: {len(data)} of {stop - start} bytes in {timeout_s:g} s")
    if len(data) != stop - start:
        raise TransferError(f"{len(data)} bytes where {stop - start} were asked for")
    return bytes(data)


def reading(
    url: str, start: int, version: str | None, timeout_s: float, stop: int | None = None
) -> AbstractContextManager[Body]:
    """Open an object, and read it from a byte on; see :func:`maskmatch_scale.data.remote.stores.reading`."""
    ask = stores.reading if _may_be_asked_here() else store_process.reading
    return ask(url, start, version, timeout_s, stop)


def listing(url: str, timeout_s: float) -> Iterator[list[stores.Found]]:
    """All objects below a folder; see :func:`maskmatch_scale.data.remote.stores.listing`."""
    ask = stores.listing if _may_be_asked_here() else store_process.listing
    return ask(url, timeout_s)


def _may_be_asked_here() -> bool:
    """Whether obstore may be used in this process: it will not be forked, and was not forked too late.

    Loader processes and those of pools are started by multiprocessing, and start none themselves. If another process
    that was started by it does, `are_lost` is true there.
    """
    return multiprocessing.parent_process() is not None and not stores.are_lost()
