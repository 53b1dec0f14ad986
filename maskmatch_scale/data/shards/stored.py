"""Large indexes: written with a file for each large table, and read by one process of a node for all of them.

Parsing the JSON of a million shards takes seconds and more than a gigabyte. So ``index.json`` names a file for the
shards of a large stream (:mod:`~maskmatch_scale.data.shards.columns`), and a large JSON, which others or older versions
wrote, is parsed by one process of a node. All of them map the columns (:mod:`~maskmatch_scale.data.node_arrays`).

Decision: docs/decisions/0069-arrays-of-a-node.md.
Decision: docs/decisions/0070-tables-of-large-streams.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.node_arrays import LARGE, Arrays, NodeArrays
from maskmatch_scale.data.remote.address import join
from maskmatch_scale.data.remote.cache_disk import explained
from maskmatch_scale.data.remote.cache_place import on_this_machine
from maskmatch_scale.data.remote.shard_cache import ShardCache
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.data.shards.columns import TableReference, packed, read_table_file, reference, unpacked
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardIndex, ShardTable, StreamEntry
from maskmatch_scale.files import sha256, write_whole
from maskmatch_scale.redact import is_remote, shown

LARGE_BYTES = 8 << 20
"""From this size on an ``index.json`` is parsed by one process of a node."""

_HEAD = 64 << 10
"""Bytes at the beginning of an index of ours in which its streams begin."""
_KEPT = 8
"""Indexes of which the columns are kept. Who has mapped others keeps them."""
_VERSION = 1
"""Of the columns: raise it when their meaning changes."""


def write_index(folder: Path, index: ShardIndex, mode: int = 0o666) -> None:
    """Write ``index.json``, and before it a file for each stream of many shards, which it names.

    Args:
        folder: where they are written.
        index: what is written.
        mode: permissions of the files, less those that the umask takes.

    Raises:
        OSError: one cannot be written. The index that was there is as it was.
    """
    tables = {}
    for name, stream in index.streams.items():
        if len(stream.shards) >= LARGE:
            data = packed(columns := stream.shards.columns())
            # Its content is in its name: the index that is there, or one that is read now, still has its own.
            beginning = f"shards-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}"
            file = f"{beginning}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
            write_whole(folder / file, data, mode)
            tables[name] = reference(file, data, columns)
    write_whole(folder / INDEX_NAME, index.to_json(tables), mode)
    named = {said.table for said in tables.values()}
    for path in folder.glob("shards-*.safetensors"):
        if path.name not in named and re.search(r"-[0-9a-f]{16}\.safetensors$", path.name):
            path.unlink(missing_ok=True)


def of_node(options: FetchOptions) -> NodeArrays:
    """The arrays that the processes of this user on this node share, in the folder of the cache if that is local."""
    return NodeArrays(on_this_machine(options.cache) / f"arrays-{os.getuid()}")


def parse_index(data: bytes, root: str, where: str, options: FetchOptions | None) -> ShardIndex:
    """Read the bytes of an ``index.json`` of ours, and the tables that it names.

    Args:
        data: the bytes.
        root: path or address of the folder or of the index, to which the names of tables are relative.
        where: names the index in messages.
        options: of the cache, by which the processes of a node share what is large; None: this one shares nothing.

    Raises:
        DataError: they do not parse, or a table cannot be read.
    """

    def read_table(said: TableReference) -> ShardTable:
        location = join(root, said.table)

        def make() -> Arrays:
            return ShardTable.of_columns(_columns(location, said, options)).all_columns()

        if options is None or said.shards < LARGE:
            return ShardTable.of_columns(make())
        kind, arrays = f"shards{_VERSION}", of_node(options)
        is_to_fetch = is_remote(location) and arrays.find(kind, said.sha256) is None
        if is_to_fetch:
            # Before the lock: if it cannot be fetched, those who wait for it there are told so, and do not try again.
            _cache_of_tables(options).open(location, said.bytes, said.sha256).close()
        found = arrays.get(kind, said.sha256, make, most=_KEPT)
        if is_to_fetch and arrays.find(kind, said.sha256) is not None:
            _cache_of_tables(options).forget(location, said.sha256)
        return ShardTable.of_columns(found)

    def parse() -> ShardIndex:
        return ShardIndex.parse(data, where, read_table)

    if options is None or len(data) < LARGE_BYTES:
        return parse()
    return share_index(hashlib.sha256(data).hexdigest(), parse, options)


def large_index(path: Path, options: FetchOptions) -> ShardIndex | None:
    """A large local index, without reading it into memory if another process of this node has parsed it.

    Returns:
        None if it is small, not there, or not one of ours: it must be read in the usual way.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size < LARGE_BYTES or b'"streams"' not in file.read(_HEAD):
                return None
        digest = sha256(path)
        return share_index(digest, lambda: _parsed_here(path, digest), options)
    except (OSError, DataError):
        return None


def share_index(digest: str, parse: Callable[[], ShardIndex], options: FetchOptions) -> ShardIndex:
    """An index, parsed by one process of this node and mapped by all.

    Args:
        digest: hex, of all that it depends on.
        parse: makes it.
        options: of the cache.
    """
    arrays = of_node(options).get(f"index{_VERSION}", digest, lambda: _as_arrays(parse()), most=_KEPT)
    head = json.loads(arrays["head"].tobytes())
    streams = {}
    pixels = head.pop("class_pixels", {})  # which older versions did not keep
    for number, (name, labelled) in enumerate(head.pop("streams").items()):
        own = f"{number}."
        columns = {column.removeprefix(own): array for column, array in arrays.items() if column.startswith(own)}
        table = ShardTable.of_columns(columns)
        streams[name] = StreamEntry(labelled=labelled, shards=table, class_pixels=pixels.get(name))
    return ShardIndex.model_validate({**head, "streams": streams})


def share_tables(index: ShardIndex, options: FetchOptions | None) -> ShardIndex:
    """The same index, with the columns of large streams mapped by all processes of this node that have made it."""
    if options is None:
        return index
    streams = {}
    for name, stream in index.streams.items():
        table = stream.shards
        if len(table) >= LARGE:
            digest = hashlib.sha256()
            for column, values in table.columns().items():
                digest.update(f"{column} {len(values)} ".encode())
                digest.update(np.ascontiguousarray(values).data)
            found = of_node(options).get(f"shards{_VERSION}", digest.hexdigest(), table.all_columns, most=_KEPT)
            table = ShardTable.of_columns(found)
        streams[name] = stream.model_copy(update={"shards": table})
    return index.model_copy(update={"streams": streams})


def _parsed_here(path: Path, digest: str) -> ShardIndex:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError(f"{path}: it was written anew meanwhile; start again")
    return parse_index(data, str(path), str(path), None)


def _columns(location: str, said: TableReference, options: FetchOptions | None) -> Arrays:
    """The columns of a table, fetched if it is elsewhere."""
    if not is_remote(location):
        return read_table_file(Path(location), said)
    assert options is not None
    with _cache_of_tables(options).open(location, said.bytes, said.sha256) as file:
        return unpacked(file.readall(), said, shown(location))


def _cache_of_tables(options: FetchOptions) -> ShardCache:
    """Where tables are fetched to: a folder that this user alone may read, because addresses in them may have secrets.

    Raises:
        DataError: it cannot be made.
    """
    folder = of_node(options).folder
    with explained(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return ShardCache(replace(options, cache=folder))


def _as_arrays(index: ShardIndex) -> Arrays:
    """The columns of all streams, by number of the stream, and the rest as JSON."""
    head = index.model_dump(mode="json", exclude={"streams"})
    head["streams"] = {name: stream.labelled for name, stream in index.streams.items()}
    head["class_pixels"] = {name: stream.class_pixels for name, stream in index.streams.items()}
    columns = {
        f"{number}.{column}": array
        for number, stream in enumerate(index.streams.values())
        for column, array in stream.shards.all_columns().items()
    }
    return {"head": np.frombuffer(json.dumps(head).encode(), dtype=np.uint8), **columns}
