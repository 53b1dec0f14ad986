"""The local shards that this process keeps open, over all streams.

A run may have many sources, each with many shards, and a process may have few descriptors (`ulimit -n`, often 1024),
which sockets and shared memory need too. So there is one bound for the whole process, not one for each stream.

Shards in the cache of remote ones are not kept open at all: a file that is dropped from the cache takes room on the
disk until it is closed.
"""

from __future__ import annotations

import errno
import resource
from collections import OrderedDict
from collections.abc import Callable
from io import FileIO
from typing import TypeVar

from maskmatch_scale.data.faults import DataError

T = TypeVar("T")

_MOST = 512
_SHARE = 4
"""Of the descriptors that the process may have, at most one in so many is used here."""
_NONE_LEFT = (errno.EMFILE, errno.ENFILE)
"""What the system says if it has no descriptor left for this process, or for any."""

_kept: OrderedDict[str, FileIO] = OrderedDict()
"""By path, the least recently used first. A forked process goes on with the files of its parent: they are read by
`os.pread`, so that nobody depends on the position that the two would share."""


def keep_open(path: str) -> FileIO:
    """A local file, open for reading without a buffer. It stays open until others need the descriptor; do not close it.

    Raises:
        OSError: it cannot be opened.
        DataError: no descriptor is left.
    """
    file = _kept.get(path)
    if file is None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _MOST if soft == resource.RLIM_INFINITY else max(1, min(_MOST, soft // _SHARE))
        while len(_kept) >= most:
            _close_oldest()
        _kept[path] = file = with_descriptors(lambda: FileIO(path))
    _kept.move_to_end(path)
    return file


def with_descriptors(call: Callable[[], T]) -> T:
    """Call a function that opens files; if no descriptor is left, close a file that is kept open and call it again.

    Raises:
        DataError: no descriptor is left, and no file is kept open.
        OSError: the function raised another one.
    """
    while True:
        try:
            return call()
        except OSError as error:
            if error.errno not in _NONE_LEFT:
                raise
            if not _kept:
                raise DataError(
                    f"{error.strerror}: this process has no descriptor left to open a shard; raise the limit "
                    "(`ulimit -n`) or lower data.workers"
                ) from None
            _close_oldest()


def _close_oldest() -> None:
    _, oldest = _kept.popitem(last=False)
    oldest.close()
