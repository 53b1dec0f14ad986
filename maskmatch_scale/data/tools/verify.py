"""Checking a shard folder against its index, down to every pixel of a label map."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.images.decode import MAX_PIXELS, decode_image, decode_label
from maskmatch_scale.data.shards.index import ShardEntry, ShardIndex, StreamEntry
from maskmatch_scale.data.shards.reading import ShardOpener, load_index
from maskmatch_scale.data.shards.tar import TarTable, read_table

OpenShard = Callable[[str], BinaryIO]
"""Opens a shard by its name in the index; raises OSError or DataError where it is not to be had."""

_SMALL_BYTES = 100_000_000
"""Folders up to this size are checked in this process: starting others takes longer."""
_IN_FLIGHT_A_WORKER = 4
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a shard folder.

    Attributes:
        stream: name of the stream.
        shard: its file, as the index has it.
        key: of the sample; None if the shard itself is at fault.
        reason: one of :data:`maskmatch_scale.data.faults.REASONS`.
        message: one line that names shard and key, what is wrong and what to do.
    """

    stream: str
    shard: str
    key: str | None
    reason: str
    message: str

    def as_json(self) -> dict[str, str | None]:
        """Its fields, for `--json`."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}, stream {self.stream}]"


def verify(
    root: str | Path,
    *,
    deep: bool = True,
    progress: bool = False,
    workers: int | None = None,
    index: ShardIndex | None = None,
    open_shard: OpenShard | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Fault]:
    """Check every shard: presence, size, checksum, number of samples, headers, keys, and what decodes.

    Args:
        root: the shard folder.
        deep: whether to decode every image and label map, and look for label values that are no class.
        progress: whether to show a bar on stderr, if that is a terminal.
        workers: processes; None takes one a core for more than 100 MB. More than one start by `spawn`: a script that
            calls this needs an `if __name__ == "__main__":` guard.
        index: of the folder; None reads ``root/index.json``.
        open_shard: how to open a shard, picklable if there are workers; None opens ``root/file``.
        max_pixels: larger images are faults.

    Returns:
        The faults as they are found, in the order of the index; those of keys that two shards share come last in their
        stream.

    Raises:
        DataError: no index, or one that does not parse; a process was killed.
    """
    index = index or load_index(str(root))
    open_shard = open_shard or ShardOpener(str(root))
    check = _Check(len(index.classes), index.ignore_index, deep, max_pixels, open_shard)
    shards = sum(len(stream.shards) for stream in index.streams.values())
    if workers is None:
        small = sum(int(stream.shards.bytes.sum()) for stream in index.streams.values()) <= _SMALL_BYTES
        workers = 1 if small else len(os.sched_getaffinity(0))
    return _faults(index, check, min(workers, shards), progress)


_Job = tuple[str, bool, ShardEntry]
"""A shard to check: its stream, whether that is labelled, its entry."""
_Checked = tuple[list[Fault], NDArray[np.uint64]]
"""Faults of a shard, and a hash of each key by place."""


@dataclass(frozen=True)
class _Check:
    """Finds everything that a shard shows of itself."""

    num_classes: int
    ignore_index: int
    deep: bool
    max_pixels: int
    open_shard: OpenShard

    def __call__(self, job: _Job) -> _Checked:
        stream, labelled, entry = job
        again = "fetch or write it again"
        faults: list[Fault] = []

        def found(reason: str, message: str, key: str | None = None) -> None:
            faults.append(Fault(stream, entry.file, key, reason, message))

        hashes = np.empty(0, np.uint64)
        try:
            with self.open_shard(entry.file) as file:
                size, digest = _size_and_digest(file)
                if size != entry.bytes:
                    said = f"{size} bytes where the index says {entry.bytes}"
                    found("shard_unreadable", f"{entry.file}: {said}; {again}")
                elif digest != entry.sha256:
                    said = "its bytes are not those the index has the checksum of"
                    found("shard_unreadable", f"{entry.file}: {said}; {again}")
                table = read_table(file, entry.file, labelled=labelled)
                hashes = np.fromiter((_hash(table.key(place)) for place in range(len(table))), np.uint64, len(table))
                if len(table) != entry.samples:
                    said = f"{len(table)} samples where the index says {entry.samples}"
                    why = f" ({table.damage})" if table.damage else ""
                    reason = "truncated" if table.truncated else "shard_unreadable"
                    found(reason, f"{entry.file}: {said}{why}; {again}")
                for place in range(len(table)):
                    try:
                        self._check_sample(file, table, place)
                    except BadSample as bad:
                        found(bad.reason, str(bad), table.key(place))
        except BadSample as bad:
            found(bad.reason, str(bad))
        except (OSError, DataError) as error:
            message = str(error) if entry.file in str(error) else f"{entry.file}: {error}"
            found("shard_unreadable", f"{message}; {again}")
        return faults, hashes

    def _check_sample(self, file: BinaryIO, table: TarTable, place: int) -> None:
        if not self.deep:
            if fault := table.fault(place):
                raise fault
            return
        image, label = table.read(file, place)
        name = f"{table.shard}: sample {table.key(place)!r}"
        pixels = decode_image(image, name, max_pixels=self.max_pixels, contiguous=False)
        if label is not None:
            decode_label(
                label,
                name,
                num_classes=self.num_classes,
                ignore_index=self.ignore_index,
                size=(pixels.shape[1], pixels.shape[2]),
                max_pixels=self.max_pixels,
            )


def _faults(index: ShardIndex, check: _Check, workers: int, progress: bool) -> Iterator[Fault]:
    jobs = ((name, stream.labelled, entry) for name, stream in index.streams.items() for entry in stream.shards)
    total = sum(stream.samples for stream in index.streams.values())
    with _bar(total, progress) as advance, _checked(check, jobs, workers) as checked:
        for name, stream in index.streams.items():
            hashes = []
            for samples in stream.shards.samples.tolist():
                faults, keys = next(checked)
                hashes.append(keys)
                advance(samples)
                yield from faults
            if hashes:
                yield from _shared_keys(name, stream, hashes, check.open_shard)


def _size_and_digest(file: BinaryIO) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    file.seek(0)
    while block := file.read(_READ_BYTES):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _shared_keys(
    name: str, stream: StreamEntry, hashes: list[NDArray[np.uint64]], open_shard: OpenShard
) -> Iterator[Fault]:
    """Keys that two shards of a stream have: eight bytes a key find them, whatever the number of samples."""
    every = np.concatenate(hashes)
    shard_of = np.repeat(np.arange(len(hashes)), [len(keys) for keys in hashes])
    order = np.argsort(every, kind="stable")
    same = np.flatnonzero(every[order][1:] == every[order][:-1])
    repeated = np.unique(every[order[same]])
    first: dict[str, int] = {}
    told: set[tuple[str, int]] = set()
    for number in np.unique(shard_of[np.concatenate([order[same], order[same + 1]])]).tolist():
        file_name = stream.shards.file(number)
        with suppress(OSError, DataError), open_shard(file_name) as file:
            table = read_table(file, file_name, labelled=stream.labelled)
            for key in map(table.key, np.flatnonzero(np.isin(hashes[number], repeated)).tolist()):
                kept = first.setdefault(key, number)
                if kept != number and (key, number) not in told:
                    told.add((key, number))
                    also = f"{stream.shards.file(kept)} has a sample of this key too; rename one"
                    yield Fault(name, file_name, key, "duplicate_key", f"{file_name}: sample {key!r}: {also}")


@contextmanager
def _checked(check: _Check, jobs: Iterator[_Job], workers: int) -> Iterator[Iterator[_Checked]]:
    """What the check finds in each job, in order."""
    if workers <= 1:
        yield map(check, jobs)
        return
    # spawn: the caller may hold threads and a GPU that a fork would break.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield _in_order(pool, check, jobs, workers * _IN_FLIGHT_A_WORKER)
    except BrokenProcessPool:
        raise DataError("a checking process was killed (out of memory?); try again with fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, check: _Check, jobs: Iterator[_Job], in_flight: int) -> Iterator[_Checked]:
    waiting: deque[Future[_Checked]] = deque()
    for job in jobs:
        waiting.append(pool.submit(check, job))
        if len(waiting) >= in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells the user, once


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[int], Any]]:
    if not (wanted and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("samples", total=total)
        yield lambda samples: bar.advance(task, samples)
