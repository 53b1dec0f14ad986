"""Pools that apply one function to many items: of processes, by which shards are written, verified and surveyed, and of
threads, which wait for disks and servers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from maskmatch_scale.data.faults import DataError

T = TypeVar("T")
R = TypeVar("R")

_IN_FLIGHT_A_WORKER = 4
_ITEMS_A_THREAD = 64
"""Items that a thread takes at once: handing over one takes as long as asking a local disk about a file."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def results(
    function: Callable[[T], R], items: Iterable[T], workers: int, *, if_killed: str, ordered: bool = True
) -> Iterator[Iterator[R]]:
    """Apply a function to each item in `workers` processes, while the body runs.

    At most four items a process are under way at once, so that neither items nor results pile up in memory. An
    exception that the function raises is raised here, and ends the pool.

    Args:
        function: of one item. With several workers it is pickled, and sent to each process once: it may hold tables.
        items: taken as they are needed; picklable if there are several workers.
        workers: processes, started by `spawn`, with one thread each. One or fewer: the function runs in this process.
        if_killed: the message if a process is killed.
        ordered: whether the results come in the order of the items. Otherwise they come as they are ready, so that a
            slow item holds up no other.

    Yields:
        An iterator over what the function returns.

    Raises:
        DataError: a process was killed, for example because memory ran out.
    """
    if workers <= 1:
        yield map(function, items)
        return
    # spawn: the caller may hold threads and a GPU that a fork would break.
    context = multiprocessing.get_context("spawn")
    with _one_thread_each():
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(function,))
        try:
            yield (_in_order if ordered else _as_ready)(pool, items, workers * _IN_FLIGHT_A_WORKER)
        except BrokenProcessPool:
            raise DataError(if_killed) from None
        finally:
            pool.shutdown(cancel_futures=True)


def in_threads(
    function: Callable[[T], R], items: Sequence[T], threads: int, at_once: int = _ITEMS_A_THREAD
) -> Generator[R, None, None]:
    """What a function that waits for a disk or a server returns for each item, in order.

    Args:
        function: of one item; called by several threads at once. What it raises is raised here.
        items: all of them.
        threads: how many.
        at_once: items that a thread takes at once, at most; what they give is not seen before the last one is done.
    """
    chunk = max(1, min(at_once, len(items) // (4 * threads)))
    chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    pool = ThreadPoolExecutor(threads, thread_name_prefix="asking")
    ended = threading.Event()
    try:
        for results_of_chunk in pool.map(
            lambda chunk: [function(item) for item in chunk if not ended.is_set()], chunks
        ):
            yield from results_of_chunk
    finally:
        ended.set()  # threads need not finish chunks that nobody waits for
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, items: Iterable[Any], in_flight: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(_apply, item))
        if len(waiting) >= in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _as_ready(pool: ProcessPoolExecutor, items: Iterable[Any], in_flight: int) -> Iterator[Any]:
    waiting: set[Future[Any]] = set()
    for item in items:
        waiting.add(pool.submit(_apply, item))
        if len(waiting) >= in_flight:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started within the body have one thread each: numeric libraries read these variables as they load."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_function: list[Callable[[Any], Any]] = []
"""In a process of the pool: the function that it applies."""


def _start_worker(function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports the interruption, once
    _function.append(function)


def _apply(item: Any) -> Any:
    return _function[0](item)
