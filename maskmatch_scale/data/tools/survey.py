"""An index for shards that exist already: counted, measured and checksummed, wherever they lie."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote.address import expand, is_remote
from maskmatch_scale.data.remote.shard_cache import ShardCache
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardIndex, ShardTable, StreamEntry, sha256
from maskmatch_scale.data.shards.tar import read_table

_KNOWN_NAME = ".survey.jsonl"
"""What has been looked at, one shard a line, so that an interrupted survey goes on where it stopped."""


def survey(
    streams: Mapping[str, Sequence[str]],
    labelled: Sequence[str],
    out: Path,
    options: FetchOptions,
    *,
    classes: Sequence[str] = (),
    palette: Sequence[tuple[int, int, int]] = (),
    ignore_index: int = 255,
    workers: int | None = None,
    begin: Callable[[int], Callable[[], None]] = lambda total: lambda: None,
) -> ShardIndex:
    """Look at every shard and write ``out/index.json``.

    Args:
        streams: patterns of each stream's shards: paths, globs, brace patterns, URLs.
        labelled: names of the streams with label maps.
        out: folder of the index, made if it is not there. Shards within it are listed by their name alone.
        options: how shards of other machines are fetched.
        classes: names by label value; empty where nothing is labelled.
        palette: one RGB colour a class, 0–255.
        ignore_index: label value that counts for nothing.
        workers: processes; None = one a core.
        begin: called with the number of shards to look at; what it returns is called after each.

    Raises:
        DataError: no shard matches, one cannot be read or is empty, or one stands in the list twice.
    """
    out.mkdir(parents=True, exist_ok=True)
    locations = {
        name: [place for pattern in patterns for place in expand(pattern)] for name, patterns in streams.items()
    }
    for name, found in locations.items():
        if len(set(found)) < len(found):
            twice = next(place for place in found if found.count(place) > 1)
            raise DataError(f"stream {name!r}: {twice} is listed twice")
    known = _known(out)
    missing = [
        (place, name in labelled)
        for name, found in locations.items()
        for place in found
        if _identity(place, name in labelled) not in known
    ]
    advance = begin(len(missing))
    with (out / _KNOWN_NAME).open("a") as file:
        for entry in _look_at_all(missing, options, workers or len(os.sched_getaffinity(0))):
            file.write(json.dumps(entry) + "\n")
            file.flush()
            known[entry["identity"]] = entry
            advance()
    index = ShardIndex(
        source="survey",
        classes=tuple(classes),
        palette=tuple(palette),
        ignore_index=ignore_index,
        streams={
            name: StreamEntry(
                labelled=name in labelled,
                shards=ShardTable(_entry(known[_identity(place, name in labelled)], out) for place in found),
            )
            for name, found in locations.items()
        },
    )
    beside = out / f".{INDEX_NAME}.new"
    beside.write_bytes(index.to_json())
    beside.replace(out / INDEX_NAME)
    (out / _KNOWN_NAME).unlink()
    return index


def _known(out: Path) -> dict[str, dict[str, Any]]:
    path = out / _KNOWN_NAME
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off when the survey was killed
        found[entry["identity"]] = entry
    return found


def _identity(location: str, labelled: bool) -> str:
    """Shard, and for a local one its size and time: a shard that changed is looked at again."""
    identity = f"{location} {labelled}"
    if not is_remote(location):
        try:
            status = Path(location).stat()
        except OSError as error:
            raise DataError(f"{location}: {error.strerror}") from None
        identity += f" {status.st_size} {status.st_mtime_ns}"
    return identity


def _look_at_all(shards: Sequence[tuple[str, bool]], options: FetchOptions, workers: int) -> Iterator[dict[str, Any]]:
    if workers == 1 or len(shards) < 2:
        yield from (_look_at(location, labelled, options) for location, labelled in shards)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        waiting: set[Future[dict[str, Any]]] = set()
        for location, labelled in shards:
            waiting.add(pool.submit(_look_at, location, labelled, options))
            if len(waiting) >= 2 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _look_at(location: str, labelled: bool, options: FetchOptions) -> dict[str, Any]:
    path = _fetched(location, options) if is_remote(location) else Path(location)
    with path.open("rb") as file:
        table = read_table(file, location, labelled=labelled)
    if table.truncated:
        raise DataError(f"{location}: cut off after {len(table)} samples; write it again, or leave it out")
    if not len(table):
        raise DataError(f"{location}: holds no sample; leave it out")
    return {
        "identity": _identity(location, labelled),
        "location": location,
        "samples": len(table),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
    }


def _fetched(location: str, options: FetchOptions) -> Path:
    cache = ShardCache(options)
    cache.forget(location)  # it may have changed since, and no checksum is known that would tell
    return cache.fetch(location)


def _entry(found: Mapping[str, Any], out: Path) -> dict[str, Any]:
    location = str(found["location"])
    if not is_remote(location):
        path = Path(location).absolute()
        location = path.name if path.parent == out.absolute() else str(path)
    return {"file": location, **{name: found[name] for name in ("samples", "bytes", "sha256")}}
