"""Files of every other ``scheme://`` that fsspec knows, such as ``hf://``, ``file://`` and ``hdfs://``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TypeVar

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote.address import scrubbed
from maskmatch_scale.data.remote.transfer import Transfer, TransferError
from maskmatch_scale.redact import shown
from maskmatch_scale.timeouts import call_within

_T = TypeVar("_T")

_BLOCK = 4 << 20
"""Bytes of one request to a store. They must arrive within the time-out."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def get(transfer: Transfer) -> None:
    """Fetch what is missing of a file, in one try.

    Raises:
        TransferError: the try has failed.
        DataError: the library for this scheme is not installed.
    """
    file, total = _ask(transfer.url, transfer.timeout_s, lambda: _open(transfer.url))
    with _closing(file):
        if total is not None:
            transfer.expect(total)
        if transfer.received:
            _ask(transfer.url, transfer.timeout_s, lambda: file.seek(transfer.received))
        while block := _ask(transfer.url, transfer.timeout_s, lambda: file.read(_BLOCK)):
            transfer.write(block)


def names(pattern: str, timeout_s: float) -> list[str]:
    """Addresses of all files that a pattern with ``*`` stands for.

    Raises:
        TransferError: the try has failed.
        DataError: the library for this scheme is not installed.
    """

    def find() -> list[str]:
        system, path = _system(pattern)
        return [system.unstrip_protocol(found) for found in system.glob(path)]

    return _ask(pattern, timeout_s, find)


def _open(url: str) -> tuple[IO[bytes], int | None]:
    """Open the file; also gives its size in bytes, if the store says it."""
    system, path = _system(url)
    return system.open(path, "rb", block_size=_BLOCK), system.size(path)


def _system(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    import fsspec

    try:
        # Not kept by us: fsspec itself keeps one file system per process, and uses none that a parent made.
        system, path = fsspec.core.url_to_fs(url)
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise TransferError("no such kind of address", "check what stands before ://", final=True) from None
    system.invalidate_cache()  # forget the listings that an earlier try read
    return system, path


def _ask(url: str, timeout_s: float, call: Callable[[], _T]) -> _T:
    """Call a library that has no time-outs, in a thread that is abandoned if it takes too long."""
    try:
        return call_within(call, timeout_s, name="fsspec")
    except TimeoutError as error:
        raise TransferError(f"stalled: {error}") from None
    except TransferError:
        raise
    except ImportError as error:
        scheme = url.partition("://")[0].rpartition(":")[2]
        raise DataError(
            f"{shown(url)}: {scheme}:// needs a library that is not installed; {scrubbed(str(error), url)}"
        ) from None
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
