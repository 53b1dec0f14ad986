"""Writing a shard folder from a source: in parallel, the same bytes every time, and safe to kill at any moment.

The order of events in the folder::

    .lock                   held while a writer is at work
    .writing.json           what is being written; a restart with other settings is refused
    .labelled-000000.tar    a shard being written …
    labelled-000000.tar     … renamed when it is complete and on the disk
    index.json              last of all; .writing.json goes

A restart keeps the shards that are complete and renders the others.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.index import INDEX_NAME, ShardEntry, ShardIndex, ShardTable, StreamEntry, sha256
from maskmatch_scale.data.tar import IMAGE_EXTENSIONS
from maskmatch_scale.errors import UserError

SAMPLES_PER_SHARD = 256
"""Default upper limit of samples in a shard."""

MIN_SHARDS = 8
"""A stream is spread over at least so many shards (or one a sample), so that ranks have shards of their own."""

_PLAN_NAME = ".writing.json"
_LOCK_NAME = ".lock"
_IN_FLIGHT_A_WORKER = 4
_SECONDS_BETWEEN_LINES = 10.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True)
class EncodedSample:
    """One sample, ready to be stored.

    Attributes:
        key: unique in its stream; no dot and no slash.
        image: an encoded image.
        extension: one of :data:`maskmatch_scale.data.shards.IMAGE_EXTENSIONS`; `png` only where there is no label.
        label: an 8-bit single-channel PNG of class values, or None.
    """

    key: str
    image: bytes
    extension: str
    label: bytes | None = None


@dataclass(frozen=True)
class Stream:
    """The samples of one stream before they are rendered: small picklable descriptions, in the order of the shards."""

    labelled: bool
    items: Sequence[Any]


class Source(Protocol):
    """Where samples come from. `sources/scores.py` is the model to follow."""

    @property
    def name(self) -> str:
        """Written to the index."""

    @property
    def settings(self) -> Mapping[str, object]:
        """Everything the bytes depend on, as JSON values; two sources of equal settings write equal shards."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label value."""

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """One RGB colour a class, 0–255."""

    @property
    def ignore_index(self) -> int:
        """Label value of pixels that count for nothing."""

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The streams by name."""

    @property
    def render(self) -> Callable[[Any], EncodedSample]:
        """A picklable pure function from one item of a stream to its sample; it runs in another process."""


def write_shards(
    source: Source,
    out: str | Path,
    *,
    workers: int | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    progress: bool = True,
) -> ShardIndex:
    """Render every sample of a source into tar shards and write their index.

    The shards hold the same bytes whatever the number of workers, and however often the writing was interrupted.

    Args:
        source: what to write.
        out: the folder; made if it is not there. A folder that this source has finished is left as it is.
        workers: processes that render; None takes one for each core this process may use, 1 renders in this process.
            More than one start by `spawn`: a script that calls this needs an `if __name__ == "__main__":` guard.
        samples_per_shard: upper limit; streams smaller than this times their least number of shards get smaller ones.
        progress: whether to report on stderr, a bar with the time left on a terminal, a line now and then elsewhere.

    Returns:
        The index, as it lies in `out/index.json`.

    Raises:
        DataError: the folder was begun or finished with other settings, somebody else is writing to it, or a sample
            could not be rendered.
        UserError: `workers` or `samples_per_shard` is less than 1.
    """
    if samples_per_shard < 1 or (workers is not None and workers < 1):
        raise UserError(f"workers={workers}, samples_per_shard={samples_per_shard}: both must be at least 1")
    out = Path(out)
    identity = {"source": source.name, **source.settings, "samples_per_shard": samples_per_shard}
    identity = json.loads(json.dumps(identity))  # as it will be read back: tuples become lists
    settings = {key: value for key, value in identity.items() if key != "source"}
    out.mkdir(parents=True, exist_ok=True)
    with _only_writer(out):
        if (out / INDEX_NAME).exists():
            index = ShardIndex.load(out)
            _refuse_other_settings(out, {"source": index.source, **index.settings}, identity)
            if _is_whole(out, index):
                return index
        elif (out / _PLAN_NAME).exists():
            _refuse_other_settings(out, json.loads((out / _PLAN_NAME).read_bytes()), identity)
        else:
            _replace(out / _PLAN_NAME, json.dumps(identity, indent=2).encode())

        shards = {name: _cut(name, stream, samples_per_shard) for name, stream in source.streams.items()}
        missing = [shard for cut in shards.values() for shard in cut if not (out / shard.file).is_file()]
        _render_all(source, out, missing, workers or _cores(), progress)

        index = ShardIndex(
            source=source.name,
            settings=settings,
            classes=source.classes,
            palette=source.palette,
            ignore_index=source.ignore_index,
            streams={
                name: StreamEntry(
                    labelled=stream.labelled,
                    shards=ShardTable(_entry(out / shard.file, len(shard.items)) for shard in shards[name]),
                )
                for name, stream in source.streams.items()
            },
        )
        _replace(out / INDEX_NAME, index.to_json())
        (out / _PLAN_NAME).unlink(missing_ok=True)
        return index


@dataclass(frozen=True)
class _Shard:
    file: str
    labelled: bool
    items: Sequence[Any]


def _cut(name: str, stream: Stream, samples_per_shard: int) -> list[_Shard]:
    """Consecutive items in shards whose sizes differ by one at most."""
    total = len(stream.items)
    count = max(min(MIN_SHARDS, total), -(-total // samples_per_shard))
    edges = [total * number // count for number in range(count + 1)] if count else [0]
    return [
        _Shard(f"{name}-{number:06d}.tar", stream.labelled, stream.items[start:end])
        for number, (start, end) in enumerate(itertools.pairwise(edges))
    ]


def _render_all(source: Source, out: Path, shards: Sequence[_Shard], workers: int, progress: bool) -> None:
    total = sum(len(shard.items) for shard in shards)
    if not total:
        return
    items = (item for shard in shards for item in shard.items)
    with _progress(source.name, total, progress) as advance, _render(source.render, items, workers) as samples:
        for shard in shards:
            _write_shard(out, shard, itertools.islice(samples, len(shard.items)), advance)


def _write_shard(out: Path, shard: _Shard, samples: Iterator[EncodedSample], advance: Callable[[], None]) -> None:
    import webdataset

    begun = out / f".{shard.file}"
    keys = set()
    with begun.open("wb") as file:
        # A fixed time and raw bytes: nothing but the samples decides what the tar holds.
        with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            for sample in samples:
                _check(sample, shard)
                if sample.key in keys:
                    raise DataError(f"{shard.file}: two samples are called {sample.key!r}; keys must differ")
                keys.add(sample.key)
                members = {"__key__": sample.key, sample.extension: sample.image}
                if sample.label is not None:
                    members["png"] = sample.label
                tar.write(members)
                advance()
        file.flush()
        os.fsync(file.fileno())
    begun.replace(out / shard.file)


def _check(sample: EncodedSample, shard: _Shard) -> None:
    where = f"{shard.file}: sample {sample.key!r}"
    if not sample.key or set("./") & set(sample.key):
        raise DataError(f"{where}: a key may hold no dot and no slash (webdataset cuts names at the first dot)")
    if sample.extension not in IMAGE_EXTENSIONS:
        raise DataError(f"{where}: image extension {sample.extension!r} is none of {', '.join(IMAGE_EXTENSIONS)}")
    if (sample.label is not None) != shard.labelled:
        state = "carries no label map" if shard.labelled else "carries a label map"
        raise DataError(f"{where} {state}, but its stream is {'' if shard.labelled else 'un'}labelled")
    if shard.labelled and sample.extension == "png":
        raise DataError(f"{where}: the .png of a labelled sample is its label map; store the image as jpg or webp")


@contextmanager
def _render(
    render: Callable[[Any], EncodedSample], items: Iterator[Any], workers: int
) -> Iterator[Iterator[EncodedSample]]:
    """The samples in the order of their items, rendered in `workers` processes."""
    if workers == 1:
        yield map(render, items)
        return
    # spawn: the caller may hold threads and a GPU that a fork would break.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield _in_order(pool, render, items, workers * _IN_FLIGHT_A_WORKER)
    except BrokenProcessPool:
        raise DataError(
            "a rendering process was killed (out of memory?); run the same command again: finished shards are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, render: Callable[[Any], EncodedSample], items: Iterator[Any], in_flight: int
) -> Iterator[EncodedSample]:
    # Bounded: a slow sample at the head must not let the rest pile up in memory.
    waiting: deque[Future[EncodedSample]] = deque()
    for item in items:
        waiting.append(pool.submit(render, item))
        if len(waiting) >= in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_worker() -> None:
    """One thread a process (this module loads no numeric library, so the variables are still in time)."""
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells the user, once


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _progress(name: str, total: int, wanted: bool) -> Iterator[Callable[[], None]]:
    if not wanted:
        yield lambda: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total)
            yield lambda: bar.advance(task)
    else:
        yield _Lines(name, total)


class _Lines:
    """Progress for log files: a line every few seconds and one at the end."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._began = self._said = time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES or self._done == self._total:
            self._said = now
            rate = self._done / max(now - self._began, 1e-9)
            left = (self._total - self._done) / rate
            sys.stderr.write(
                f"{self._name}: {self._done}/{self._total} samples, {rate:.1f} a second, {left:.0f} s left\n"
            )
            sys.stderr.flush()


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    # The kernel drops the lock when the process ends, however it ends.
    with (out / _LOCK_NAME).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another process is writing shards here; wait for it") from None
        except OSError:
            pass  # a file system without locks
        yield


def _refuse_other_settings(out: Path, written: Mapping[str, object], asked: Mapping[str, object]) -> None:
    for key in sorted(written.keys() | asked.keys()):
        if written.get(key) != asked.get(key):
            raise DataError(
                f"{out}: holds shards written with {key}={written.get(key)!r}, but {key}={asked.get(key)!r} is asked "
                "for; choose another folder or delete this one"
            )


def _is_whole(out: Path, index: ShardIndex) -> bool:
    shards = [shard for stream in index.streams.values() for shard in stream.shards]
    for shard in shards:
        path = out / shard.file
        if path.is_file() and path.stat().st_size != shard.bytes:
            path.unlink()  # damaged since: render it again
    return all((out / shard.file).is_file() for shard in shards)


def _entry(path: Path, samples: int) -> ShardEntry:
    return ShardEntry(file=path.name, samples=samples, bytes=path.stat().st_size, sha256=sha256(path))


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    begun = path.with_name(f".{path.name.lstrip('.')}.new")
    with begun.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    begun.replace(path)
