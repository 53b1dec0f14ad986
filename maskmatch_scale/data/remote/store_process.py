"""Object stores, asked by a process of their own.

obstore's threads are not there in a forked process, and every call would wait for them for ever. A rank asks for an
index, and is then forked into loader processes. So the rank leaves obstore to another process, which it starts:

    python -c CODE DESCRIPTOR PATH…

That process answers requests on a connection, one after the other, until the connection is closed, also by the end of
the process at the other end. A request is JSON, ``[what, …arguments]``; an answer is JSON (``{"failed": …}`` or what is
known of the object), and, if it has not failed, blocks, an empty block, and JSON again.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote import stores
from maskmatch_scale.data.remote.transfer import Body, TransferError

_START_S = 60.0
"""Seconds in which a process starts, also on a busy machine with Python on a network file system."""
_CODE = f"import sys; sys.path[:] = sys.argv[2:]; from {__name__} import main; main(int(sys.argv[1]))"
"""Modules are found where this process finds them; `python -m` would look into the working directory first."""
_GRACE_S = 10.0
"""The other process gives up first, after the time-out, and says why."""


@contextmanager
def reading(url: str, start: int, version: str | None, timeout_s: float, stop: int | None = None) -> Iterator[Body]:
    """See :func:`maskmatch_scale.data.remote.stores.reading`."""
    with _process() as process:
        about = process.ask(["read", url, start, version, timeout_s, stop], timeout_s)
        yield Body(about["size"], about["version"], process.blocks(timeout_s))


def listing(url: str, timeout_s: float) -> Iterator[list[stores.Found]]:
    """See :func:`maskmatch_scale.data.remote.stores.listing`."""
    with _process() as process:
        process.ask(["list", url, timeout_s], timeout_s)
        for block in process.blocks(timeout_s):
            yield [stores.Found(*found) for found in json.loads(block)]


def end_all() -> None:
    """End those processes that wait for a request."""
    while _idle:
        _idle.pop().end()


class _Process:
    """A process that asks object stores."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the process that started it
            )
        _all.add(self)
        self.is_idle = True
        """Whether it waits for a request."""

    def ask(self, request: list[Any], timeout_s: float) -> dict[str, Any]:
        """Send a request, and take the first part of the answer.

        Raises:
            TransferError: the try has failed.
            DataError: obstore is not installed.
        """
        self.is_idle = False
        try:
            self._connection.send_bytes(json.dumps(request).encode())
        except OSError:
            raise TransferError("the process that asks object stores has ended") from None
        return self._known(self._receive(_START_S + timeout_s))

    def blocks(self, timeout_s: float) -> Iterator[bytes]:
        """The rest of the answer.

        Raises:
            TransferError: the try has failed.
        """
        while block := self._receive(timeout_s + _GRACE_S):
            yield block
        self._known(self._receive(timeout_s + _GRACE_S))
        self.is_idle = True

    def end(self) -> None:
        _all.discard(self)
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def close_inherited(self) -> None:
        self._connection.close()

    def _known(self, part: bytes) -> dict[str, Any]:
        known: dict[str, Any] = json.loads(part)
        if "failed" in known:
            self.is_idle = True
            if known["how"] is None:
                raise DataError(*known["failed"])
            raise TransferError(*known["failed"], **known["how"])
        return known

    def _receive(self, timeout_s: float) -> bytes:
        try:
            if self._connection.poll(timeout_s):
                return self._connection.recv_bytes()
        except (EOFError, OSError):
            raise TransferError("the process that asks object stores has ended") from None
        raise TransferError(f"stalled: no answer in {timeout_s:g} s")


_all: set[_Process] = set()
_idle: list[_Process] = []


def _in_child() -> None:
    # The processes belong to the parent. They end when the last copy of their connection is closed.
    _idle.clear()
    while _all:
        _all.pop().close_inherited()


os.register_at_fork(after_in_child=_in_child)


@contextmanager
def _process() -> Iterator[_Process]:
    """A process for one request. It is kept for the next one, unless it has not answered this one to the end."""
    try:
        process = _idle.pop()
    except IndexError:
        process = _Process()
    try:
        yield process
    finally:
        if process.is_idle:
            _idle.append(process)
        else:
            process.end()


def main(descriptor: int) -> None:
    """Answer requests until the connection is closed."""
    threading.Thread(target=_end_with, args=(descriptor,), daemon=True).start()
    with Connection(descriptor) as connection, suppress(EOFError, OSError):
        while True:
            for part in _answer(*json.loads(connection.recv_bytes())):
                connection.send_bytes(part)


def _end_with(descriptor: int) -> None:
    """End this process when the connection is closed at the other end, also while a store does not answer."""
    closed = select.poll()
    closed.register(descriptor, 0)
    closed.poll()
    os._exit(0)


def _answer(what: str, *arguments: Any) -> Iterator[bytes]:
    failed: dict[str, Any] = {}
    begun = False
    try:
        if what == "read":
            with stores.reading(*arguments) as body:
                begun = True
                yield json.dumps({"size": body.size, "version": body.version}).encode()
                yield from body.blocks
        else:
            begun = True
            yield b"{}"
            yield from (json.dumps(some).encode() for some in stores.listing(*arguments))
    except DataError as error:
        failed = {"failed": [str(error)], "how": None}
    except TransferError as error:
        how = {"final": error.final, "wait_s": error.wait_s, "restart": error.restart}
        failed = {"failed": [str(error), error.advice], "how": how}
    if begun:
        yield b""
    yield json.dumps(failed).encode()
