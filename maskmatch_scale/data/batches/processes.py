"""Loader processes that leave signals to their parent, and never outlive it.

Ctrl-C and many launchers signal every process of a job. A loader process that ended of it would take away the batches
that the run needs until it stops. So loader processes ignore what stops a run, and end when their parent does, however
it ends: a pipe, of which only the parent has the writing end, is closed by the kernel at the latest. A thread of each
loader process waits for that.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Generator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TypeVar, get_args

from torch.utils.data import DataLoader, Dataset

from maskmatch_scale.recipe.values import StopSignal

T = TypeVar("T")

_held: set[Connection] = set()
"""The writing ends of this process."""


def in_processes(
    dataset: Dataset[T], numbers: Sequence[int], workers: int, ahead: int, *, pin_memory: bool = False
) -> Generator[T, None, None]:
    """Items of a dataset in order, made ahead of time by loader processes.

    Close the generator if not all items were taken: this ends the processes, whatever they are doing.

    Args:
        dataset: maps a number to an item.
        numbers: of the items.
        workers: processes, at least 1.
        ahead: items that each process makes ahead of time.
        pin_memory: whether torch's loader puts the items into page-locked memory.
    """
    reader, writer = Pipe(duplex=False)
    _held.add(writer)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=ahead,
        pin_memory=pin_memory,
        worker_init_fn=_FollowParent(reader),
    )
    # Held until the processes have ended. When it goes, torch waits 5 s for each process that is still at work.
    items = iter(loader)
    try:
        yield from items
    finally:
        if writer in _held:
            _held.remove(writer)
            writer.close()
        reader.close()


class _FollowParent:
    """What a loader process does first.

    Args:
        reader: of the pipe.
    """

    def __init__(self, reader: Connection) -> None:
        self._reader = reader

    def __call__(self, worker: int) -> None:
        """Ignore the signals, and start to wait for the end of the parent."""
        for name in get_args(StopSignal):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        threading.Thread(target=self._wait, name="parent", daemon=True).start()

    def _wait(self) -> None:
        self._reader.poll(None)  # nothing is ever sent
        os._exit(0)  # another code would make torch raise an error in a parent that lives


def _let_go() -> None:
    while _held:
        _held.pop().close()


# A forked child has copies, which would keep other loader processes alive.
os.register_at_fork(after_in_child=_let_go)
# Before multiprocessing, at exit, waits for processes whose loader was not closed.
atexit.register(_let_go)
