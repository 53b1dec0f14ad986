"""An index for shards that exist already, local or remote: their samples, bytes and checksums."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.pool import results, usable_cores
from maskmatch_scale.data.remote.patterns import expand
from maskmatch_scale.data.remote.shard_cache import ShardCache
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardIndex, ShardTable, StreamEntry
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.files import append_lines, sha256, write_whole
from maskmatch_scale.progress import progress_of
from maskmatch_scale.redact import has_secret, is_remote, shown

_KNOWN_NAME = ".survey.jsonl"
"""What has been looked at, one shard a line: an interrupted survey goes on where it stopped, and one of a folder that
has grown looks only at the shards that were added."""


def survey(
    streams: Mapping[str, Sequence[str]],
    labelled: Sequence[str],
    out: Path,
    options: FetchOptions,
    *,
    classes: Sequence[str] = (),
    palette: Sequence[tuple[int, int, int]] = (),
    ignore_index: int = 255,
    rescan: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> ShardIndex:
    """Look at every shard that was not looked at before, and write ``out/index.json``.

    Args:
        streams: patterns of each stream's shards: paths, globs, brace patterns, URLs.
        labelled: names of the streams with label maps.
        out: folder of the index, made if it is not there. Shards within it are listed by their name alone.
        options: how shards of other machines are fetched.
        classes: names by label value; empty where nothing is labelled.
        palette: one RGB colour a class, 0–255.
        ignore_index: label value of ignored pixels.
        rescan: whether to look at all shards again. A local one whose size or time has changed is looked at in any
            case; a remote one is taken to be as it was.
        workers: processes; None takes one a core. Several are started by `spawn`, so a script that calls this needs
            an `if __name__ == "__main__":` guard.
        progress: whether to show a bar on stderr. In a log it is drawn once, at the end.

    Raises:
        DataError: no shard matches, one cannot be read or is empty, or one stands in the list twice; a process was
            killed.
    """
    out.mkdir(parents=True, exist_ok=True)
    locations = {
        name: [place for pattern in patterns for place in expand(pattern)] for name, patterns in streams.items()
    }
    for name, found in locations.items():
        if len(set(found)) < len(found):
            twice = next(place for place in found if found.count(place) > 1)
            raise DataError(f"stream {name!r}: {shown(twice)} is listed twice")
    # Both files have the addresses as they were given: they are needed to fetch.
    mode = 0o600 if has_secret(locations) else 0o666
    known = {} if rescan else _known(out)
    missing = [
        (place, name in labelled)
        for name, found in locations.items()
        for place in found
        if _identity(place, name in labelled) not in known
    ]
    workers = 1 if len(missing) < 2 else workers or usable_cores()
    killed = "a process was killed (out of memory?); run the same command again: it goes on with the other shards"
    with (
        progress_of("", len(missing), unit="shards", wanted=progress, elsewhere="last bar") as advance,
        # Not in order: a shard that is slow to fetch must not keep the others waiting, nor out of the notes.
        results(_LookAt(options), missing, workers, if_killed=killed, ordered=False) as entries,
    ):
        for entry in entries:
            append_lines(out / _KNOWN_NAME, [json.dumps(entry)], mode)
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
    write_whole(out / INDEX_NAME, index.to_json(), mode)
    used = {_identity(place, name in labelled): place for name, found in locations.items() for place in found}
    places = set(used.values())
    # Without what was noted of a shard before it changed.
    kept = [entry for identity, entry in known.items() if identity in used or entry["location"] not in places]
    write_whole(out / _KNOWN_NAME, "".join(json.dumps(entry) + "\n" for entry in kept), mode)
    return index


def _known(out: Path) -> dict[str, dict[str, Any]]:
    """What earlier surveys have found, by identity."""
    path = out / _KNOWN_NAME
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            found[entry["identity"]] = entry
        except (ValueError, TypeError, KeyError):
            continue  # cut off when the survey was killed
    return found


def _identity(location: str, labelled: bool) -> str:
    """A shard's location and, if it is local, its size and time: a shard that changed is looked at again."""
    identity = f"{location} {labelled}"
    if not is_remote(location):
        try:
            status = Path(location).stat()
        except OSError as error:
            raise DataError(f"{location}: {error.strerror}") from None
        identity += f" {status.st_size} {status.st_mtime_ns}"
    return identity


@dataclass(frozen=True)
class _LookAt:
    """Looks at shards, each given as its location and whether it has label maps; picklable."""

    options: FetchOptions

    def __call__(self, shard: tuple[str, bool]) -> dict[str, Any]:
        location, labelled = shard
        return _look_at(location, labelled, self.options)


def _look_at(location: str, labelled: bool, options: FetchOptions) -> dict[str, Any]:
    """A shard's entry for the index, and its identity; raises :class:`DataError` for one that is empty or cut off."""
    path = _fetched(location, options) if is_remote(location) else Path(location)
    with path.open("rb") as file:
        table = read_table(file, shown(location), labelled=labelled)
    if table.truncated:
        raise DataError(f"{shown(location)}: cut off after {len(table)} samples; write it again, or leave it out")
    if not len(table):
        raise DataError(f"{shown(location)}: holds no sample; leave it out")
    return {
        "identity": _identity(location, labelled),
        "location": location,
        "samples": len(table),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
    }


def _fetched(location: str, options: FetchOptions) -> Path:
    cache = ShardCache(options)
    cache.forget(location)  # it may have changed since, and there is no checksum to compare it with
    return cache.fetch(location)


def _entry(found: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """A shard's entry in the index; what lies in the folder of the index is listed by its name alone."""
    location = str(found["location"])
    if not is_remote(location):
        path = Path(location).absolute()
        location = path.name if path.parent == out.absolute() else str(path)
    return {"file": location, **{name: found[name] for name in ("samples", "bytes", "sha256")}}
