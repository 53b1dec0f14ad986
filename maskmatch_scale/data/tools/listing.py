"""Which shards a pattern stands for, and what indexes and notes that exist say of them. No shard is opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maskmatch_scale.data.faults import DataError, NotFetched
from maskmatch_scale.data.pool import in_threads
from maskmatch_scale.data.remote.address import is_index, join
from maskmatch_scale.data.remote.fetch import fetch_bytes
from maskmatch_scale.data.remote.patterns import expand_with_facts
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.data.shards import foreign
from maskmatch_scale.data.shards.finding import find_index, is_list, read_list
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.redact import PIPE, is_remote, shown

_TAR = ".tar"
_THREADS = 32
"""They wait for servers; a machine far away takes a tenth of a second to answer."""


@dataclass(frozen=True)
class Listed:
    """A shard, and what an index or a note says of it; None for what none says.

    Attributes:
        location: absolute path or address.
        samples: number of its samples; 0 if it is empty.
        bytes: its size.
        sha256: hex digest.
        etag: strong ETag.
    """

    location: str
    samples: int | None = None
    bytes: int | None = None
    sha256: str | None = None
    etag: str | None = None


def listed(patterns: Sequence[str], stream: str, options: FetchOptions) -> list[Listed]:
    """The shards that patterns stand for, in order.

    Args:
        patterns: of paths or addresses of shards; also folders and files that
            :func:`~maskmatch_scale.data.shards.finding.find_index` takes, and texts with a shard a line.
        stream: the one that is taken from an index; of an index that has a single stream, that one.
        options: how files of other machines are fetched.

    Raises:
        DataError: nothing matches; an index cannot be read, or does not have the stream; a shard is listed twice.
    """
    found = [
        shard if is_remote(shard.location) else replace(shard, location=str(Path(shard.location).absolute()))
        for pattern in patterns
        for shard in _of_pattern(pattern, stream, options)
    ]
    seen = set()
    for shard in found:
        if shard.location in seen:
            raise DataError(f"stream {stream!r}: {shown(shard.location)} is listed twice")
        seen.add(shard.location)
    return found


def _of_pattern(pattern: str, stream: str, options: FetchOptions) -> list[Listed]:
    if is_list(pattern) and not pattern.startswith(PIPE):
        rows = read_list(pattern, options)
        return [Listed(join(pattern, row["file"]), row["samples"], row["bytes"]) for row in rows]
    if not _is_root(pattern):
        return [Listed(found.url, bytes=found.bytes, etag=found.etag) for found in expand_with_facts(pattern)]
    index = find_index(pattern, options)
    name = stream if stream in index.streams or len(index.streams) != 1 else next(iter(index.streams))
    if name not in index.streams:
        raise DataError(f"{shown(pattern)}: it has no stream {stream!r} but {', '.join(map(repr, index.streams))}")
    return entries_of(index, name, pattern)


def entries_of(index: ShardIndex, stream: str, root: str) -> list[Listed]:
    """The shards of a stream of an index that lies at ``root``."""
    return [
        Listed(join(root, entry.file), entry.samples, entry.bytes, entry.sha256, entry.etag)
        for entry in index.streams[stream].shards
    ]


def _is_root(pattern: str) -> bool:
    """Whether a pattern is a folder or an index, and not a shard or several, by its name and by the file system."""
    if not is_remote(pattern):
        return Path(pattern).is_dir() or (is_index(pattern) and Path(pattern).is_file())
    if pattern.startswith(PIPE):
        return False
    path = pattern.partition("?")[0]
    return is_index(path) or path.endswith("/") or not re.search(r"\.[^/]*$|[{*]", path)


def with_notes(shards: Sequence[Listed], options: FetchOptions) -> list[Listed]:
    """The shards with the samples that img2dataset's notes beside them say, where they are not known yet.

    Of shards elsewhere, the first one is asked for its note: if there is none, the others are taken to have none.

    Raises:
        DataError: a note cannot be read.
    """

    def noted(shard: Listed) -> Listed:
        where = foreign.stats_name(shard.location)
        try:
            data = fetch_bytes(where, options) if is_remote(where) else Path(where).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return shard
        except NotFetched as error:
            if error.may_pass:
                raise DataError(str(error)) from None
            return shard
        except OSError as error:
            raise DataError(f"{where}: {error.strerror}") from None
        return replace(shard, samples=foreign.successes(data, shown(where)))

    asked = [shard for shard in shards if shard.samples is None and shard.location.endswith(_TAR)]
    asked = [shard for shard in asked if not shard.location.startswith(PIPE)]
    elsewhere = [shard for shard in asked if is_remote(shard.location)]
    if elsewhere and noted(elsewhere[0]).samples is None:
        asked = [shard for shard in asked if not is_remote(shard.location)]
    said = {shard.location: shard for shard in in_threads(noted, asked, _THREADS)}
    return [said.get(shard.location, shard) for shard in shards]
