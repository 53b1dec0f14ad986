"""An index for shards that exist already, local or remote: their samples, bytes and checksums.

Where an index or a note that exists says how many samples a shard has, the shard is not opened: its checksum stays
unknown, and its size is asked of the disk or of the server.

Decision: docs/decisions/0064-counts-of-others.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.bands import Band
from maskmatch_scale.data.pool import in_threads, results, usable_cores
from maskmatch_scale.data.remote.fetch import ask_size
from maskmatch_scale.data.remote.shard_cache import ShardCache
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardIndex, ShardTable, StreamEntry
from maskmatch_scale.data.shards.offsets import is_side_car_of, side_car, write_side_car
from maskmatch_scale.data.shards.stored import write_index
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.data.tools.listing import Listed, entries_of, listed, with_notes
from maskmatch_scale.data.tools.survey_notes import Entry, SurveyNotes, entry_of, identity
from maskmatch_scale.files import sha256_of, write_whole
from maskmatch_scale.progress import progress_of
from maskmatch_scale.redact import has_secret, is_remote, shown

_THREADS = 32
_NOTED_AT_ONCE = 256
"""Answers of servers that are noted at once."""


@dataclass(frozen=True)
class Meaning:
    """What the values of label maps and the pages of images mean.

    Attributes:
        classes: names by label value; empty where nothing is labelled.
        palette: one RGB colour a class, 0–255.
        ignore_index: value of ignored pixels.
        bands: what the pages of images are; empty: images are plain ones.
    """

    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    ignore_index: int = 255
    bands: tuple[Band, ...] = ()


def survey(
    streams: Mapping[str, Sequence[str]],
    labelled: Sequence[str],
    out: Path,
    options: FetchOptions,
    meaning: Meaning = Meaning(),
    *,
    rescan: bool = False,
    scan: bool = False,
    add: bool = False,
    offsets: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> ShardIndex:
    """Look at every shard of which nothing is known, and write ``out/index.json`` and a wids list of each stream.

    Args:
        streams: patterns of each stream's shards: paths, globs, brace patterns, URLs; folders and files that have an
            index, also of another tool (:func:`~maskmatch_scale.data.tools.listing.listed`).
        labelled: names of the streams with label maps.
        out: folder of the index, made if it is not there. Shards within it are listed by their name alone.
        options: how shards of other machines are fetched.
        meaning: of the label maps and the images.
        rescan: whether to look at all shards again. A local one whose size or time has changed is looked at in any
            case; a remote one is taken to be as it was.
        scan: whether to open every shard, for its checksum, also those whose number of samples an index says.
        add: whether to keep the streams of the index that is there, and append to them.
        offsets: whether to write where the samples of each shard begin, which needs every shard opened. An index that
            has them keeps them.
        workers: processes; None takes one a core. Several are started by `spawn`, so a script that calls this needs
            an `if __name__ == "__main__":` guard.
        progress: whether to show a bar on stderr. In a log it is drawn once, at the end.

    Raises:
        DataError: no shard matches, one cannot be read or is empty, or one stands in the list twice; a process was
            killed.
    """
    before = _index_before(out, needed=add)
    offsets = offsets or (before is not None and before.offsets)
    found = {name: listed(patterns, name, options) for name, patterns in streams.items()}
    if add and before is not None:
        found, labelled, meaning = _added(before, out, found, labelled, meaning)
    if labelled and not meaning.classes:
        raise DataError("labelled shards: --classes FILE must say what the label values mean")
    out.mkdir(parents=True, exist_ok=True)
    # All files have the addresses as they were given: they are needed to fetch.
    mode = 0o600 if has_secret([shard.location for shards in found.values() for shard in shards]) else 0o666
    notes = SurveyNotes(out, before, mode, afresh=rescan)

    def is_known(shard: Listed, name: str) -> bool:
        entry = notes.get(identity(shard.location, name in labelled))
        if entry is None or (offsets and not is_side_car_of(_side_car(shard.location, out), entry.get("sha256", ""))):
            return False
        return "sha256" in entry or (not scan and shard.samples in (None, entry["samples"]))

    scan = scan or offsets
    missing = []
    for name, shards in found.items():
        unknown = [shard for shard in shards if not is_known(shard, name)]
        now = {shard.location: shard for shard in (unknown if scan else with_notes(unknown, options))}
        missing += [(shard, name in labelled) for shard in now.values() if shard.samples != 0]
        found[name] = [shard for shard in shards if now.get(shard.location, shard).samples != 0]
    counted = [(shard, labels) for shard, labels in missing if shard.samples is not None and not scan]
    to_scan = [(shard.location, labels) for shard, labels in missing if shard.samples is None or scan]
    with progress_of("", len(missing), unit="shards", wanted=progress, elsewhere="last bar") as advance:
        _ask(counted, options, notes, advance)
        _scan(to_scan, _LookAt(options, out if offsets else None), workers, notes, advance)
    identities = {
        name: [identity(shard.location, name in labelled) for shard in shards] for name, shards in found.items()
    }
    index = ShardIndex(
        source="survey",
        classes=meaning.classes,
        palette=meaning.palette,
        ignore_index=meaning.ignore_index,
        bands=meaning.bands,
        offsets=offsets,
        streams={
            name: StreamEntry(
                labelled=name in labelled, shards=ShardTable(_entry(notes[each], out) for each in identities[name])
            )
            for name in found
        },
    )
    write_index(out, index, mode)
    for name, stream in index.streams.items():
        write_whole(out / f"wids-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.json", _wids(name, stream), mode)
    notes.finish([each for of_stream in identities.values() for each in of_stream])
    return index


def _index_before(out: Path, needed: bool) -> ShardIndex | None:
    """The index that is there; None if there is none, or one that does not parse and is not needed."""
    if not (out / INDEX_NAME).is_file():
        return None
    try:
        return ShardIndex.load(out)
    except DataError:
        if needed:
            raise
        return None


def _added(
    before: ShardIndex, out: Path, found: Mapping[str, Sequence[Listed]], labelled: Sequence[str], meaning: Meaning
) -> tuple[dict[str, list[Listed]], list[str], Meaning]:
    """The streams of an index that is there, with what was found besides; which are labelled; and the meaning."""
    # Their samples are in the notes, or in the index: those of a shard that has changed since are not taken from there.
    streams = {
        name: [Listed(shard.location) for shard in entries_of(before, name, str(out.absolute()))]
        for name in before.streams
    }
    for name, shards in found.items():
        if name in before.streams and before.streams[name].labelled != (name in labelled):
            raise DataError(f"{out / INDEX_NAME}: stream {name!r} cannot have shards with and without labels")
        joined = {shard.location: shard for shard in streams.get(name, [])}
        streams[name] = list((joined | {shard.location: shard for shard in shards}).values())
    if meaning.bands and meaning.bands != before.bands:
        raise DataError(f"{out / INDEX_NAME}: it has other bands or ranges of values; make an index of its own")
    meaning = replace(meaning, bands=before.bands)
    of_before = Meaning(before.classes, before.palette, before.ignore_index, before.bands)
    if before.classes and meaning.classes and meaning != of_before:
        raise DataError(f"{out / INDEX_NAME}: it has other classes, colours or ignore_index; make an index of its own")
    named = [*labelled, *(name for name, stream in before.streams.items() if stream.labelled)]
    return streams, named, of_before if before.classes else meaning


def _ask(
    shards: Sequence[tuple[Listed, bool]], options: FetchOptions, notes: SurveyNotes, advance: Callable[[], None]
) -> None:
    """Note the entries of shards whose samples are known; their sizes, if not known, are asked for."""

    def entry(shard: tuple[Listed, bool]) -> Entry:
        known, labels = shard
        if not is_remote(known.location):
            known = replace(known, bytes=Path(known.location).stat().st_size)
        elif known.bytes is None:
            size, etag = ask_size(known.location, options)
            known = replace(known, bytes=size, etag=etag)
        if known.bytes == 0:
            raise DataError(
                f"{shown(known.location)}: an empty file, where {known.samples} samples are noted; write it again"
            )
        return entry_of(known, labels)

    waiting: list[Entry] = []
    try:
        for answered in in_threads(entry, shards, _THREADS):
            waiting.append(answered)
            advance()
            if len(waiting) >= _NOTED_AT_ONCE:
                notes.add(waiting)
                waiting = []
    finally:
        if waiting:
            notes.add(waiting)


def _scan(
    shards: Sequence[tuple[str, bool]],
    look_at: _LookAt,
    workers: int | None,
    notes: SurveyNotes,
    advance: Callable[[], None],
) -> None:
    """Open shards, and note their entries."""
    workers = 1 if len(shards) < 2 else workers or usable_cores()
    killed = "a process was killed (out of memory?); run the same command again: it goes on with the other shards"
    # Not in order: a shard that is slow to fetch must not keep the others waiting, nor out of the notes.
    with results(look_at, shards, workers, if_killed=killed, ordered=False) as entries:
        for entry in entries:
            notes.add([entry])
            advance()


def _wids(name: str, stream: StreamEntry) -> str:
    """The list of a stream's shards that readers of webdataset's wids take; addresses and paths as in our index."""
    shards = [
        {"url": shard.file, "nsamples": shard.samples, **({"filesize": shard.bytes} if shard.bytes else {})}
        for shard in stream.shards
    ]
    lines = ",\n".join(f"  {json.dumps(shard)}" for shard in shards)
    head = json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name})[:-1]
    return f'{head},\n "shardlist": [\n{lines}\n]}}\n'


@dataclass(frozen=True)
class _LookAt:
    """Looks at shards, each given as its location and whether it has label maps; picklable.

    Attributes:
        options: how they are fetched.
        out: folder of the index, if side-cars with the offsets of samples are to be written beside it.
    """

    options: FetchOptions
    out: Path | None

    def __call__(self, shard: tuple[str, bool]) -> Entry:
        location, labelled = shard
        return _look_at(location, labelled, self.options, self.out)


def _look_at(location: str, labelled: bool, options: FetchOptions, out: Path | None) -> Entry:
    """A shard's entry; raises :class:`DataError` for one that is empty or cut off."""
    # It is opened once: others that fetch may drop it from a full cache meanwhile.
    with _fetched(location, options) if is_remote(location) else FileIO(location) as file:
        table = read_table(file, shown(location), labelled=labelled)
        if table.truncated:
            raise DataError(f"{shown(location)}: cut off after {len(table)} samples; write it again, or leave it out")
        if not len(table):
            raise DataError(f"{shown(location)}: holds no sample; leave it out")
        size, digest = os.fstat(file.fileno()).st_size, sha256_of(file)
        if out is not None:
            write_side_car(file, _side_car(location, out), size, digest, labelled=labelled)
    return entry_of(Listed(location, len(table), size, digest), labelled)


def _fetched(location: str, options: FetchOptions) -> FileIO:
    cache = ShardCache(options)
    cache.forget(location)  # it may have changed since, and there is no checksum to compare it with
    return cache.open(location)


def _entry(found: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """A shard's entry in the index."""
    facts = {name: value for name, value in found.items() if name not in ("identity", "location")}
    return {"file": _file(str(found["location"]), out), **facts}


def _file(location: str, out: Path) -> str:
    """A shard as the index names it; what lies in the folder of the index is listed by its name alone."""
    if is_remote(location):
        return location
    path = Path(location).absolute()
    return path.name if path.parent == out.absolute() else str(path)


def _side_car(location: str, out: Path) -> Path:
    return out / side_car(_file(location, out))
