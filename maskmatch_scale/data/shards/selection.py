"""Which samples of a stream are chosen by their metadata, found by reading all `.json` members once.

The numbers are kept in the folder of the shards' cache (:mod:`~maskmatch_scale.data.shards.kept`).

Decision: docs/decisions/0068-parts-of-sources.md.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from maskmatch_scale.data.faults import BadSample, DataError, NotFetched
from maskmatch_scale.data.pool import in_threads
from maskmatch_scale.data.remote import store_process
from maskmatch_scale.data.shards.kept import Numbers, Unfinished, kept_numbers
from maskmatch_scale.data.shards.metadata import MetadataFilter, read_metadata
from maskmatch_scale.data.shards.open_files import with_descriptors
from maskmatch_scale.data.shards.reading import MOST_CHECKED_AT_START, ShardStream
from maskmatch_scale.progress import progress_of
from maskmatch_scale.recipe.where import Where
from maskmatch_scale.redact import is_remote, shown

log = logging.getLogger("maskmatch_scale")

T = TypeVar("T")

_FORMAT = 1
_THREADS = 8
"""They wait for disks and servers; the headers are parsed by one at a time."""
_MOST_TASKS = 50_000
"""Of threads, 1 kB each. Up to so many shards they take them one by one: a shard may take seconds to fetch, and what an
interrupted start keeps are those that are done."""
_SECONDS_BEFORE_AN_ESTIMATE = 30.0
_SECONDS_BETWEEN_SAVES = 60.0


def chosen_numbers(
    stream: ShardStream, where: Where, name: str, cache: Path, others_wait_s: float
) -> tuple[Numbers, str]:
    """The samples of a stream that a condition chooses.

    Args:
        stream: its shards; those on other machines are fetched into the cache.
        where: the condition.
        name: of the source, for messages.
        cache: folder where the numbers are kept.
        others_wait_s: for so long other machines wait for this one, in seconds.

    Returns:
        Their numbers in the stream, int64, ascending; and what was left out for want of metadata, in words that begin
        with a comma, or empty.

    Raises:
        DataError: a shard cannot be fetched; no sample is chosen; or no sample has a field that the condition names.
    """
    what = f"source {name!r}: reading the metadata of {len(stream.shards)} shards for `where`"
    find = partial(_find, stream, where, name, others_wait_s)
    digest = digest_of(stream, "where", where.canonical)
    numbers, facts = kept_numbers(cache, f"where-{digest}", find, what)
    if facts["fault"] is not None:
        raise DataError(f"source {name!r}: {facts['fault']}")
    said = {
        "undecided": "left out for a field that is missing or of another type",
        "without": "left out without metadata",
        "unreadable": "shards left out that cannot be read",
    }
    return numbers, "".join(f", {facts[key]} {words}" for key, words in said.items() if facts[key])


def _find(
    stream: ShardStream, where: Where, name: str, others_wait_s: float, unfinished: Unfinished
) -> tuple[Numbers, dict[str, Any]]:
    total, done, unreadable = MetadataFilter(where), 0, 0
    parts: list[Numbers] = [np.empty(0, np.int64)]
    if (before := unfinished.read()) is not None:
        parts, done, unreadable = [before[0]], before[1]["shards"], before[1]["unreadable"]
        total.restore(before[1]["counts"])
    saved = time.monotonic()

    def look(shard: int, file: FileIO) -> tuple[Numbers, MetadataFilter]:
        own = MetadataFilter(where)
        # Samples beyond those that the index says are never read.
        read = islice(read_metadata(file, shown(stream.location(shard))), int(stream.shards.samples[shard]))
        places = [place for place, content in enumerate(read) if own(content)]
        return np.array(places, dtype=np.int64) + stream.shards.starts[shard], own

    def save() -> None:
        facts = {"shards": done, "unreadable": unreadable, "counts": total.as_json()}
        numbers = np.concatenate(parts)
        # A signal may have come before the last shard was counted.
        unfinished.write(numbers[: np.searchsorted(numbers, stream.shards.starts[done])], facts)

    try:
        for found in over_shards(stream, look, f"source {name!r}: metadata", others_wait_s, done):
            if isinstance(found, BadSample):
                unreadable += 1
                log.warning("source %r: `where` leaves out a whole shard: %s", name, found)
            else:
                parts.append(found[0])
                total.add(found[1])
            done += 1
            if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                save()
                saved = time.monotonic()
    except BaseException:
        save()
        raise
    facts = {"undecided": total.undecided, "without": total.without, "unreadable": unreadable}
    return np.concatenate(parts), {"fault": total.fault(), **facts}


def over_shards(
    stream: ShardStream, look: Callable[[int, FileIO], T], task: str, others_wait_s: float, first: int = 0
) -> Iterator[T | BadSample]:
    """Look at the shards of a stream, in threads.

    Args:
        stream: whose shards.
        look: at the shard of this number, which is open.
        task: name of the task, for the progress.
        others_wait_s: see :func:`chosen_numbers`.
        first: number of the shard to begin with.

    Yields:
        In the order of the shards what was returned for each; or why it cannot be read, if the stream is not strict.

    Raises:
        NotFetched: a shard cannot be fetched now.
        BadSample: the stream is strict, and a shard cannot be read.
    """

    def one(shard: int) -> T | BadSample:
        try:
            with _opened(stream, shard) as file:
                return look(shard, file)
        except NotFetched as error:
            # Other machines may get it, and would choose other samples.
            if error.may_pass or stream.strict:
                raise
            return error
        except BadSample as error:
            if stream.strict:
                raise
            return error

    began, warned, total = time.monotonic(), False, len(stream.shards)
    with (
        _store_processes_ended(),
        progress_of(task, total - first, unit="shards", elsewhere="lines if slow") as advance,
        closing(in_threads(one, range(first, total), _THREADS, 1 + total // _MOST_TASKS)) as looked,
    ):
        for done, found in enumerate(looked, start=1):
            yield found
            advance()
            spent = time.monotonic() - began
            if not warned and spent > _SECONDS_BEFORE_AN_ESTIMATE and spent / done * (total - first) > others_wait_s:
                warned = True
                log.warning(
                    "%s: this may take longer than the %.0f s that other machines wait; raise "
                    "engine.collective_timeout_s, or start again after that: it goes on where it was",
                    task,
                    others_wait_s,
                )


@contextmanager
def _store_processes_ended() -> Iterator[None]:
    """End the processes that ask object stores when the body is done: there is one for each thread."""
    try:
        yield
    finally:
        store_process.end_all()


def _opened(stream: ShardStream, shard: int) -> FileIO:
    """A shard, opened anew, because several threads do so at the same time.

    Raises:
        BadSample: it cannot be opened.
        DataError: see :meth:`ShardCache.open`.
    """
    location, shards = stream.location(shard), stream.shards
    if is_remote(location):
        facts = shards.size(shard), shards.sha256(shard), shards.etag(shard)
        return with_descriptors(partial(stream.cache.open, location, *facts))
    try:
        return with_descriptors(partial(FileIO, location))
    except OSError as error:
        raise BadSample("shard_unreadable", f"{location}: {error.strerror}; write the shard again") from None


def digest_of(stream: ShardStream, *what: str) -> str:
    """A name, in hex, for something that depends on the samples of a stream and on these texts."""
    digest = hashlib.sha256(json.dumps([_FORMAT, stream.name, stream.labels, stream.strict, *what]).encode())
    digest.update(stream.shards.samples.astype("<i8").tobytes())
    digest.update(stream.shards.identities().data)
    # Without checksums, files of one name and size in two folders look alike.
    if any(stream.shards.sha256(shard) is None for shard in range(len(stream.shards))):
        digest.update(shown(stream.root).encode())
    if len(stream.shards) <= MOST_CHECKED_AT_START:
        # So that a shard that was repaired or replaced is read again.
        digest.update(
            json.dumps(list(in_threads(partial(_changed, stream), range(len(stream.shards)), _THREADS))).encode()
        )
    return digest.hexdigest()[:32]


def _changed(stream: ShardStream, shard: int) -> list[int]:
    """Size and times of a local shard; zeros for others. Tools that copy set one of the times back."""
    location = stream.location(shard)
    if not is_remote(location):
        with suppress(OSError):
            status = Path(location).stat()
            return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return [0, 0, 0]
