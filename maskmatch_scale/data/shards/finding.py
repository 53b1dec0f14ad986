"""Which index a root has: ours, or one that another tool wrote (:mod:`~maskmatch_scale.data.shards.foreign`).

A root is a folder or a file, on this machine or elsewhere. Shards are not opened. Where the index of a local folder
does not say how large a shard is, the file system is asked.

Decision: docs/decisions/0064-counts-of-others.md.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from maskmatch_scale.data.faults import DataError, NotFetched, NotShards
from maskmatch_scale.data.pool import in_threads
from maskmatch_scale.data.remote.address import is_index, join
from maskmatch_scale.data.remote.fetch import fetch_bytes, read_bytes
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.data.shards import foreign
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardIndex
from maskmatch_scale.data.shards.not_shards import not_shards
from maskmatch_scale.data.shards.stored import LARGE_BYTES, large_index, parse_index, share_index, share_tables
from maskmatch_scale.redact import is_remote, shown

_ENERGON_INFO = (".nv-meta/.info.json", ".nv-meta/.info.yaml")
_ENERGON_SPLIT = (".nv-meta/split.yaml", ".nv-meta/split.json")
_SIZES = "sizes.json"
_NOTE = re.compile(r"(\d+)_stats\.json")
_NAMES = (INDEX_NAME, *_ENERGON_INFO, _SIZES)
_THREADS = 16
"""They wait for a disk on a network, which may take a millisecond a file."""

_Read = Callable[[str], bytes | None]
"""Reads a file of the root by its name; None if it is not there."""


def find_index(root: str, options: FetchOptions | None = None) -> ShardIndex:
    """Read the index of a folder of shards, or the one that a path or an address names.

    Args:
        root: a folder with ``index.json``, ``.nv-meta/.info.json`` (Energon) or ``sizes.json`` (open_clip); a local one
            with ``NNNNN_stats.json`` beside ``NNNNN.tar`` (img2dataset); or a file: an index of ours, a wids list, or a
            text with a shard a line.
        options: how it is fetched if it is elsewhere, and the cache by which the processes of a node share one that is
            large. None, for a local one: nothing is shared.

    Raises:
        DataError: there is none (:class:`NotShards`: the root is something else); it cannot be read; or it is not well
            formed.
    """
    if options is not None and not is_remote(root):
        path = Path(root) if is_index(root) else Path(root) / INDEX_NAME
        if (index := large_index(path, options)) is not None:
            return index
    if is_index(root.partition("?")[0] if is_remote(root) else root):
        return _of_file(root, options)
    if is_remote(root):
        assert options is not None
        return _of_address(root, options)
    return _of_folder(Path(root), options)


def modified(root: str) -> tuple[int, int]:
    """Modification time (ns) and size (bytes) of a local index. If one of them has changed, the index is read again.

    Of img2dataset's folders, which have an index in each of many files, it is those of the folder.
    """
    for path in [Path(root)] if is_index(root) else [*(Path(root) / name for name in _NAMES), Path(root)]:
        with suppress(OSError):
            status = path.stat()
            return status.st_mtime_ns, status.st_size
    return 0, 0


def is_list(root: str) -> bool:
    """Whether a root is a text with a shard a line, by its name."""
    return root.partition("?")[0].endswith(".txt")


def read_list(root: str, options: FetchOptions | None = None) -> list[foreign.Row]:
    """The entries of a text with a shard a line, as :func:`maskmatch_scale.data.shards.foreign.plain_list` gives them.

    Raises:
        DataError: it cannot be read.
    """
    return foreign.plain_list(_bytes_of(root, options), shown(root))


def _bytes_of(root: str, options: FetchOptions | None) -> bytes:
    if is_remote(root):
        assert options is not None
        return read_bytes(root, options)
    data = _read_local(Path(root))
    if data is None:
        raise NotShards(f"{root}: no such file; write shards first (`maskmatch shards write --help`)")
    return data


def _of_file(root: str, options: FetchOptions | None) -> ShardIndex:
    where = shown(root)
    if is_list(root):
        return _sized(root, "list", _counted(root, read_list(root, options)), where, options)
    data = _bytes_of(root, options)
    if options is not None and len(data) >= LARGE_BYTES and _is_complete_wids(data):
        return share_index(hashlib.sha256(data).hexdigest(), lambda: _of_complete_wids(data, where), options)
    content = foreign.parse_json(data, where)
    read = _reader(root, options, [])
    of_others = foreign.of_json(content, where, lambda: _splits(lambda name: read(name.rpartition("/")[2])))
    if of_others is None:
        return parse_index(data, root, where, options)
    return _sized(root, *of_others, where, options)


def _is_complete_wids(data: bytes) -> bool:
    """Whether a JSON is a wids list that says the size of each shard, so that an index follows from it alone."""
    shards = data.count(b'"nsamples"')
    return shards > 0 and b'"streams"' not in data and data.count(b'"filesize"') == shards


def _of_complete_wids(data: bytes, where: str) -> ShardIndex:
    """Its index; sizes that are null stay unknown, because the disk may say others at another time."""
    found = foreign.of_json(foreign.parse_json(data, where), where, lambda: None)
    if found is None:
        raise DataError(f"{where}: neither an index of ours nor a wids list; write it again")
    return foreign.as_index(*found, where)


def _reader(root: str, options: FetchOptions | None, missing: list[str]) -> _Read:
    """Reads files beside an index, or in a folder; why one is not there is added to ``missing``."""

    def read(name: str) -> bytes | None:
        if not is_remote(location := join(root, name)):
            return _read_local(Path(location))
        assert options is not None
        try:
            return fetch_bytes(location, options)
        except NotFetched as error:
            if error.may_pass:
                raise DataError(str(error)) from None
            missing.append(str(error))
            return None

    return read


def _splits(read: _Read) -> Any:
    """The content of Energon's ``split.yaml``; None if there is none."""
    found = ((name, read(name)) for name in _ENERGON_SPLIT)
    return next((foreign.parse_yaml(data, name) for name, data in found if data is not None), None)


def _of_address(root: str, options: FetchOptions) -> ShardIndex:
    missing: list[str] = []
    index = _of_names(root, _reader(root, options, missing), options)
    if index is None:
        raise DataError(
            f"{shown(root)}: no index; looked for {', '.join(_NAMES)} ({missing[0]}). Folders elsewhere cannot be "
            f"listed: for shards of img2dataset give the address of a wids list (….json), or make an index with "
            f"`maskmatch shards index '{shown(root).rstrip('/')}/{{00000..00999}}.tar' OUT`"
        )
    return index


def _of_folder(folder: Path, options: FetchOptions | None) -> ShardIndex:
    if not folder.is_dir():
        raise NotShards(f"{folder}: {not_shards(folder) or 'a file, not a shard folder'}")
    index = _of_names(str(folder), _reader(str(folder), None, []), options)
    if index is None:
        index = _of_img2dataset(folder, options)
    if index is None and (what := not_shards(folder)) is not None:
        raise NotShards(f"{folder}: {what}")
    if index is None:
        raise DataError(
            f"{folder}: {INDEX_NAME}: no index; looked for {', '.join(_NAMES)} and NNNNN_stats.json beside NNNNN.tar "
            f"(img2dataset); an interrupted `maskmatch shards write` is finished by running it again; "
            f"`maskmatch shards index '{folder}/*.tar' OUT` makes one for shards"
        )
    return index


def _of_names(root: str, read: _Read, options: FetchOptions | None) -> ShardIndex | None:
    """The index that is one file, or a few, with known names; None if there is none."""
    where = shown(join(root, INDEX_NAME))
    if (data := read(INDEX_NAME)) is not None:
        return parse_index(data, root, where, options)
    for name in _ENERGON_INFO:
        if (data := read(name)) is not None:
            where = shown(join(root, name))
            info = foreign.parse_yaml(data, where) if name.endswith(".yaml") else foreign.parse_json(data, where)
            return _sized(root, "energon", foreign.energon(info, _splits(read), where), where, options)
    if (data := read(_SIZES)) is not None:
        where = shown(join(root, _SIZES))
        content = foreign.parse_json(data, where)
        if isinstance(content, dict):
            return _sized(root, "open_clip", {foreign.STREAM: foreign.sizes(content)}, where, options)
    return None


def _of_img2dataset(folder: Path, options: FetchOptions | None) -> ShardIndex | None:
    """The index of a folder of img2dataset's; None if no shard in it has a ``NNNNN_stats.json``."""
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries}
    tars = sorted(name for name in names if name.endswith(".tar") and not name.startswith("."))
    uncounted = [tar for tar in tars if foreign.stats_name(tar) not in names]
    if len(uncounted) == len(tars):
        return None
    if uncounted:
        raise DataError(
            f"{folder / uncounted[0]}: no {foreign.stats_name(uncounted[0])} beside it says how many samples it has; "
            f"run img2dataset again if it was interrupted, or count them: `maskmatch shards index '{folder}/*.tar' OUT`"
        )
    noted = (match[1] for match in map(_NOTE.fullmatch, sorted(names)) if match is not None)
    if lost := next((number for number in noted if f"{number}.tar" not in names), None):
        raise DataError(f"{folder / lost}_stats.json: there is no {lost}.tar beside it; fetch it, or remove this file")
    rows = [{"file": tar, "samples": None} for tar in tars]
    where = str(folder)
    return _sized(where, "img2dataset", _counted(where, rows), where, options)


def _counted(root: str, rows: list[foreign.Row]) -> dict[str, list[foreign.Row]]:
    """Entries with their samples: where they are not known, img2dataset's note beside a local shard says them."""

    def count(row: foreign.Row) -> foreign.Row:
        location = join(root, row["file"])
        stats = foreign.stats_name(location)
        data = None if is_remote(location) else _read_local(Path(stats))
        if data is None:
            raise DataError(
                f"{shown(root)}: nothing says how many samples {shown(row['file'])} has; write the number after it, "
                f"or count them: `maskmatch shards index {shown(root)} OUT`"
            )
        return {**row, "samples": foreign.successes(data, stats)}

    return {foreign.STREAM: _completed(rows, "samples", count)}


def _sized(
    root: str, source: str, streams: dict[str, list[foreign.Row]], where: str, options: FetchOptions | None
) -> ShardIndex:
    """An index whose local shards have the sizes that the file system says, where the entries do not say them."""

    def size(row: foreign.Row) -> foreign.Row:
        location = join(root, row["file"])
        if is_remote(location):
            return row
        with suppress(OSError):  # it is missed when it is opened
            return {**row, "bytes": Path(location).stat().st_size or None}
        return row

    sized = {name: _completed(rows, "bytes", size) for name, rows in streams.items()}
    return share_tables(foreign.as_index(source, sized, where), options)


def _completed(
    rows: list[foreign.Row], field: str, complete: Callable[[foreign.Row], foreign.Row]
) -> list[foreign.Row]:
    """The entries; those without a field are completed in threads, which cost the others ten seconds a million."""
    completed = iter(in_threads(complete, [row for row in rows if row.get(field) is None], _THREADS))
    return [next(completed) if row.get(field) is None else row for row in rows]


def _read_local(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
