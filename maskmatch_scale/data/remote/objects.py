"""Files from object stores and every other ``scheme://`` that fsspec knows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TypeVar

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote.address import scrubbed
from maskmatch_scale.data.remote.transfer import Transfer, TransferError
from maskmatch_scale.redact import shown
from maskmatch_scale.timeouts import call_within

_T = TypeVar("_T")

_BLOCK = 4 << 20
"""Bytes of one request to a store. They must arrive within the time-out."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of this package that brings the library for a scheme."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def get(transfer: Transfer) -> None:
    """Fetch what is missing of a file, in one try.

    Raises:
        TransferError: the try has failed.
        DataError: the library for this scheme is not installed.
    """
    try:
        file, total = _ask(transfer, lambda: _open(transfer.url))
    except ImportError as error:
        scheme = transfer.url.partition("://")[0].rpartition(":")[2]
        extra = _EXTRAS.get(scheme)
        raise DataError(
            f"{shown(transfer.url)}: {scheme}:// needs a library that is not installed; "
            + (f"pip install 'maskmatch_scale[{extra}]'" if extra else scrubbed(str(error), transfer.url))
        ) from None
    with _closing(file):
        if total is not None:
            transfer.expect(total)
        if transfer.received:
            _ask(transfer, lambda: file.seek(transfer.received))
        while block := _ask(transfer, lambda: file.read(_BLOCK)):
            transfer.write(block)


def _open(url: str) -> tuple[IO[bytes], int | None]:
    """Open the file; also gives its size in bytes, if the store says it."""
    import fsspec

    try:
        # Not kept by us: fsspec itself keeps one file system per process, and uses none that a parent made.
        system, path = fsspec.core.url_to_fs(url)
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise TransferError("no such kind of address", "check what stands before ://", final=True) from None
    system.invalidate_cache()  # forget the listings that an earlier try read
    return system.open(path, "rb", block_size=_BLOCK), system.size(path)


def _ask(transfer: Transfer, call: Callable[[], _T]) -> _T:
    """Call a library that has no time-outs, in a thread that is abandoned if it takes too long."""
    try:
        return call_within(call, transfer.timeout_s, name="fsspec")
    except TimeoutError as error:
        raise TransferError(f"stalled: {error}") from None
    except (TransferError, ImportError):
        raise
    except Exception as error:
        raise TransferError(
            f"{type(error).__name__}: {error}",
            "check the address and the permissions" if isinstance(error, _FINAL) else "",
            final=isinstance(error, _FINAL),
        ) from None


@contextmanager
def _closing(file: IO[bytes]) -> Iterator[None]:
    """Close a file of fsspec's at the end, without waiting for it."""

    def close() -> None:
        with suppress(Exception):
            file.close()

    try:
        yield
    finally:
        threading.Thread(target=close, daemon=True).start()
