"""Writing a shard folder from a source: in parallel, the same bytes every time, and safe to kill at any moment.

The order of events in the folder::

    .lock                   held while a writer is at work
    .writing.json           what is being written; a restart with other settings is refused
    .labelled-000000.tar    a shard being written …
    .written.jsonl          … entered here with its size, checksum and the samples left out of it …
    labelled-000000.tar     … and renamed, now that it is complete and on the disk
    skipped.jsonl           at the end: every sample that was left out, if there was one
    index.json              last of all; .writing.json and .written.jsonl go

A restart keeps the shards that are complete and renders the others. Which samples belong to which shard is fixed before
the first is rendered, so a sample that is left out makes its own shard smaller and moves no other.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardEntry, ShardIndex, ShardTable, StreamEntry, sha256
from maskmatch_scale.data.shards.tar import IMAGE_EXTENSIONS, read_table
from maskmatch_scale.errors import UserError

SAMPLES_PER_SHARD = 256
"""Default upper limit of samples in a shard."""

MIN_SHARDS = 8
"""A stream is spread over at least so many shards (or one a sample), so that ranks have shards of their own."""

SKIPPED_NAME = "skipped.jsonl"
"""One line a sample that was left out: `shard`, `item` (its number in the stream), `reason`, `message`."""

_PLAN_NAME = ".writing.json"
_JOURNAL_NAME = ".written.jsonl"
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
        extension: one of :data:`maskmatch_scale.data.shards.tar.IMAGE_EXTENSIONS`; `png` only where there is no label.
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
        """A picklable pure function from one item of a stream to its sample; it runs in another process.

        It raises :class:`BadSample` for an item that cannot be used, and any other exception to end the writing.
        """


@runtime_checkable
class Prepares(Protocol):
    """A source that looks at its samples before they are cut into shards: drops duplicates, sets the order."""

    def prepare(self, out: Path, *, resumed: bool, workers: int, progress: bool) -> Mapping[str, Stream]:
        """The streams as they are to be written, in place of `streams`.

        Called once, while `out` is locked, before anything is rendered, and not if the folder is finished. The result
        must depend on the settings alone. What the source keeps in `out` has to be written whole or not at all.

        Args:
            out: the folder that is written.
            resumed: whether an earlier writer with the same settings was at work in `out`, and so may have kept
                something there.
            workers: threads or processes to use.
            progress: whether to report on stderr.
        """


def write_shards(
    source: Source,
    out: str | Path,
    *,
    workers: int | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    skip_bad: bool = False,
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
        skip_bad: leave out samples for which the source raises :class:`BadSample`, and list them in `skipped.jsonl`.
            Not a setting: a writing that a bad sample has stopped goes on with it.
        progress: whether to report on stderr, a bar with the time left on a terminal, a line now and then elsewhere.

    Returns:
        The index, as it lies in `out/index.json`.

    Raises:
        DataError: the folder was begun or finished with other settings, or holds shards of which nothing is known;
            somebody else is writing to it; a sample could not be rendered, or not one of a stream.
        UserError: `workers` or `samples_per_shard` is less than 1.
    """
    if samples_per_shard < 1 or (workers is not None and workers < 1):
        raise UserError(f"workers={workers}, samples_per_shard={samples_per_shard}: both must be at least 1")
    out, workers = Path(out), workers or _cores()
    identity = {"source": source.name, **source.settings, "samples_per_shard": samples_per_shard}
    identity = json.loads(json.dumps(identity))  # as it will be read back: tuples become lists
    out.mkdir(parents=True, exist_ok=True)
    with _only_writer(out):
        index = ShardIndex.load(out) if (out / INDEX_NAME).exists() else None
        resumed = index is not None or (out / _PLAN_NAME).exists()
        if index is not None:
            _refuse_other_settings(out, {"source": index.source, **index.settings}, identity)
            if _is_whole(out, index):
                return index
        elif resumed:
            _refuse_other_settings(out, json.loads((out / _PLAN_NAME).read_bytes()), identity)
        else:
            _refuse_strangers(out, source.streams)
            for name in (_JOURNAL_NAME, SKIPPED_NAME):
                (out / name).unlink(missing_ok=True)
            replace_file(out / _PLAN_NAME, json.dumps(identity, indent=2).encode())

        streams = source.streams
        if isinstance(source, Prepares):
            streams = source.prepare(out, resumed=resumed, workers=workers, progress=progress)
        shards = {name: _cut(name, stream, samples_per_shard) for name, stream in streams.items()}
        written = _written_before(out, index, itertools.chain.from_iterable(shards.values()))
        missing = [shard for cut in shards.values() for shard in cut if shard.file not in written]
        with _Journal(out / _JOURNAL_NAME) as journal:
            for entry in _render_all(source, out, missing, journal, workers, skip_bad, progress):
                written[entry.file] = entry

        in_order = [written[shard.file] for cut in shards.values() for shard in cut]
        _list_skipped(out, in_order)
        index = ShardIndex(
            source=source.name,
            settings={key: value for key, value in identity.items() if key != "source"},
            classes=source.classes,
            palette=source.palette,
            ignore_index=source.ignore_index,
            streams={
                name: StreamEntry(labelled=stream.labelled, shards=_table(out, name, shards[name], written))
                for name, stream in streams.items()
            },
        )
        replace_file(out / INDEX_NAME, index.to_json())
        for name in (_PLAN_NAME, _JOURNAL_NAME):
            (out / name).unlink(missing_ok=True)
        return index


@dataclass(frozen=True)
class _Shard:
    """Items `start` to `end` of a stream, and the tar they go to."""

    file: str
    stream: Stream
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def items(self) -> Sequence[Any]:
        return self.stream.items[self.start : self.end]


@dataclass(frozen=True)
class _Written:
    """A shard that is done. No samples and no file: all of them were left out."""

    file: str
    samples: int
    bytes: int
    sha256: str
    skipped: tuple[dict[str, Any], ...] = ()


def _cut(name: str, stream: Stream, samples_per_shard: int) -> list[_Shard]:
    """Consecutive items in shards whose sizes differ by one at most."""
    total = len(stream.items)
    count = max(min(MIN_SHARDS, total), -(-total // samples_per_shard))
    edges = [total * number // count for number in range(count + 1)] if count else [0]
    return [
        _Shard(f"{name}-{number:06d}.tar", stream, start, end)
        for number, (start, end) in enumerate(itertools.pairwise(edges))
    ]


def _table(out: Path, name: str, shards: Sequence[_Shard], written: Mapping[str, _Written]) -> ShardTable:
    entries = [written[shard.file] for shard in shards if written[shard.file].samples]
    if shards and not entries:
        raise DataError(f"{out}: not one sample of stream {name!r} could be used; {SKIPPED_NAME} says why")
    return ShardTable(
        ShardEntry(file=entry.file, samples=entry.samples, bytes=entry.bytes, sha256=entry.sha256) for entry in entries
    )


def _written_before(out: Path, index: ShardIndex | None, shards: Iterable[_Shard]) -> dict[str, _Written]:
    """The shards that need not be written again. Those that were damaged since are deleted."""
    known = _Journal.read(out / _JOURNAL_NAME)
    if index is not None:
        skipped: dict[str, list[dict[str, Any]]] = {}
        for line in _lines(out / SKIPPED_NAME):
            skipped.setdefault(line["shard"], []).append(line)
        for stream in index.streams.values():
            for entry in stream.shards:
                left_out = tuple(skipped.pop(entry.file, ()))
                known.setdefault(entry.file, _Written(**entry.model_dump(), skipped=left_out))
        for file, lines in skipped.items():
            known.setdefault(file, _Written(file, 0, 0, "", tuple(lines)))
    written = {}
    for shard in shards:
        path, done = out / shard.file, known.get(shard.file)
        if done is not None and not done.samples:
            written[shard.file] = done
        elif path.is_file():
            if done is None:
                done = _looked_into(path, shard.stream.labelled)
            if done is not None and done.bytes == path.stat().st_size:
                written[shard.file] = done
            else:
                path.unlink()
    return written


def _looked_into(path: Path, labelled: bool) -> _Written | None:
    """What a shard holds that nothing was noted of; None if it is no whole tar."""
    with path.open("rb") as file:
        try:
            table = read_table(file, path.name, labelled=labelled)
        except BadSample:
            return None
    if table.truncated or not len(table):
        return None
    return _Written(path.name, len(table), path.stat().st_size, sha256(path))


class _Journal:
    """What is known of the shards written so far, a line each; an interrupted line counts for nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Journal:
        self._file = self._path.open("ab")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def enter(self, entry: _Written) -> None:
        # The line break comes first, so that what a kill has cut off before spoils no other line.
        self._file.write(b"\n" + json.dumps(asdict(entry)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    @staticmethod
    def read(path: Path) -> dict[str, _Written]:
        return {line["file"]: _Written(**line | {"skipped": tuple(line["skipped"])}) for line in _lines(path)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; nothing if there is no file, and no line that was cut off."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError:
                    continue


def _list_skipped(out: Path, written: Iterable[_Written]) -> None:
    lines = [json.dumps(line) + "\n" for entry in written for line in entry.skipped]
    if lines:
        replace_file(out / SKIPPED_NAME, "".join(lines).encode())
    else:
        (out / SKIPPED_NAME).unlink(missing_ok=True)


def _render_all(
    source: Source,
    out: Path,
    shards: Sequence[_Shard],
    journal: _Journal,
    workers: int,
    skip_bad: bool,
    progress: bool,
) -> Iterator[_Written]:
    total = sum(len(shard) for shard in shards)
    if not total:
        return
    items = (item for shard in shards for item in shard.items())
    with progress_of(source.name, total, progress) as advance, _render(source.render, items, workers) as samples:
        for shard in shards:
            yield _write_shard(out, shard, itertools.islice(samples, len(shard)), journal, skip_bad, advance)


def _write_shard(
    out: Path,
    shard: _Shard,
    samples: Iterator[EncodedSample | BadSample],
    journal: _Journal,
    skip_bad: bool,
    advance: Callable[[], None],
) -> _Written:
    import webdataset

    begun = out / f".{shard.file}"
    keys: set[str] = set()
    skipped = []
    with begun.open("wb") as file:
        digested = _Digested(file)
        # A fixed time and raw bytes: nothing but the samples decides what the tar holds.
        with webdataset.TarWriter(digested, encoder=False, mtime=0) as tar:
            for number, sample in enumerate(samples, shard.start):
                if isinstance(sample, BadSample):
                    if not skip_bad:
                        raise BadSample(sample.reason, f"{sample}; --skip-bad (skip_bad=True) leaves such samples out")
                    line = {"shard": shard.file, "item": number, "reason": sample.reason, "message": str(sample)}
                    skipped.append(line)
                else:
                    _check(sample, shard, keys)
                    keys.add(sample.key)
                    members = {"__key__": sample.key, sample.extension: sample.image}
                    if sample.label is not None:
                        members["png"] = sample.label
                    tar.write(members)
                advance()
        file.flush()
        os.fsync(file.fileno())
    entry = _Written(shard.file, len(keys), digested.bytes, digested.sha256(), tuple(skipped))
    if not keys:
        begun.unlink()
        entry = _Written(shard.file, 0, 0, "", tuple(skipped))
    # First the journal: it alone knows what was left out. A line without its shard does no harm.
    journal.enter(entry)
    if keys:
        begun.replace(out / shard.file)
    return entry


class _Digested:
    """Counts and hashes what goes through, so that no shard is read again for its index."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def sha256(self) -> str:
        return self._digest.hexdigest()


def _check(sample: EncodedSample, shard: _Shard, keys: set[str]) -> None:
    where = f"{shard.file}: sample {sample.key!r}"
    labelled = shard.stream.labelled
    if not sample.key or set("./") & set(sample.key):
        raise DataError(f"{where}: a key may hold no dot and no slash (webdataset cuts names at the first dot)")
    if sample.key in keys:
        raise DataError(f"{shard.file}: two samples are called {sample.key!r}; keys must differ")
    if sample.extension not in IMAGE_EXTENSIONS:
        raise DataError(f"{where}: image extension {sample.extension!r} is none of {', '.join(IMAGE_EXTENSIONS)}")
    if (sample.label is not None) != labelled:
        state = "carries no label map" if labelled else "carries a label map"
        raise DataError(f"{where} {state}, but its stream is {'' if labelled else 'un'}labelled")
    if labelled and sample.extension == "png":
        raise DataError(f"{where}: the .png of a labelled sample is its label map; store the image as jpg or webp")


@contextmanager
def _render(
    render: Callable[[Any], EncodedSample], items: Iterator[Any], workers: int
) -> Iterator[Iterator[EncodedSample | BadSample]]:
    """The samples in the order of their items, rendered in `workers` processes; a bad one is its fault."""
    if workers == 1:
        yield (_attempt(render, item) for item in items)
        return
    # spawn: the caller may hold threads and a GPU that a fork would break.
    context = multiprocessing.get_context("spawn")
    with _one_thread_each():
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(render,))
        try:
            yield _in_order(pool, items, workers * _IN_FLIGHT_A_WORKER)
        except BrokenProcessPool:
            raise DataError(
                "a rendering process was killed (out of memory?); run the same command again: finished shards are kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that start meanwhile have one thread each: numeric libraries read these variables as they load."""
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


def _attempt(render: Callable[[Any], EncodedSample], item: Any) -> EncodedSample | BadSample:
    try:
        return render(item)
    except BadSample as fault:
        return fault


def _in_order(pool: ProcessPoolExecutor, items: Iterator[Any], in_flight: int) -> Iterator[EncodedSample | BadSample]:
    # Bounded: a slow sample at the head must not let the rest pile up in memory.
    waiting: deque[Future[EncodedSample | BadSample]] = deque()
    for item in items:
        waiting.append(pool.submit(_render_in_worker, item))
        if len(waiting) >= in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_worker: dict[str, Callable[[Any], EncodedSample]] = {}
"""In a rendering process: what it renders with. Sent once, for it may hold tables."""


def _start_worker(render: Callable[[Any], EncodedSample]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells the user, once
    _worker["render"] = render


def _render_in_worker(item: Any) -> EncodedSample | BadSample:
    return _attempt(_worker["render"], item)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def progress_of(
    name: str, total: int, wanted: bool, unit: str = "samples", *, even_if_quick: bool = True
) -> Iterator[Callable[[], None]]:
    """Progress on stderr: a bar with the time left on a terminal, a line now and then elsewhere.

    Args:
        name: what is under way.
        total: steps to come.
        wanted: False says nothing.
        unit: of the steps.
        even_if_quick: whether a log file gets a line of what is over in seconds.

    Yields:
        A function to call after each step.
    """
    if not wanted:
        yield lambda: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(f"{name}, {unit}", total=total)
            yield lambda: bar.advance(task)
    else:
        yield _Lines(name, total, unit, even_if_quick)


class _Lines:
    """Progress for log files: a line every few seconds and one at the end."""

    def __init__(self, name: str, total: int, unit: str, even_if_quick: bool) -> None:
        self._name, self._total, self._unit, self._done = name, total, unit, 0
        self._say_the_end = even_if_quick
        self._began = self._said = time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES or (self._done == self._total and self._say_the_end):
            self._said = now
            self._say_the_end = True
            rate = self._done / max(now - self._began, 1e-9)
            left = (self._total - self._done) / rate
            sys.stderr.write(
                f"{self._name}: {self._done}/{self._total} {self._unit}, {rate:.1f} a second, {left:.0f} s left\n"
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


def _refuse_strangers(out: Path, streams: Mapping[str, Stream]) -> None:
    """Shards in a folder that was neither begun nor finished are somebody's data."""
    for name in streams:
        if stranger := next(iter(sorted(out.glob(f"{name}-??????.tar"))), None):
            raise DataError(f"{stranger}: is there, but no {INDEX_NAME} that says what it holds; choose another folder")


def _is_whole(out: Path, index: ShardIndex) -> bool:
    """Whether every shard of a finished folder is there in its size."""
    return all(
        (out / shard.file).is_file() and (out / shard.file).stat().st_size == shard.bytes
        for stream in index.streams.values()
        for shard in stream.shards
    )


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    begun = path.with_name(f".{path.name.lstrip('.')}.new")
    with begun.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    begun.replace(path)
