"""Tables of shards as files: one process of a machine reads the headers of a shard, the others read the file.

Reading headers takes some 10 ms for a thousand samples, and each loader process needs them of every shard that it
opens. The file is read in a tenth of a millisecond. It lies in the folder of the cache: beside a fetched shard, with
which it is dropped; those of local shards in a folder of their own, ``tables/``, which is pruned. What is stale or
damaged is made again, and if nothing can be written, each process reads the headers.

Decision: docs/decisions/0072-tables-made-once-a-machine.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from io import FileIO
from typing import Protocol
from zlib import crc32

import numpy as np

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote.cache_folder import CacheFolder, fetched_digest
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.data.shards.tar import TarTable, read_table

_MAGIC = b"mm-tabl1"
_HEAD = struct.Struct("<8s32sQQQ")
"""Magic, of which shard, number of samples, bytes of the keys, bytes of the faults."""
_SETTLED_S = 2.0
"""A local shard that was written to so recently may be written to again without a change of its time."""
_LOCAL = "tables"
_MOST_LOCAL_BYTES = 1 << 29
_MOST_LOCAL = 8192
"""Tables of local shards that are kept: those that the processes of a machine read at about the same time."""
_PRUNED_EVERY = 256


class TableFiles:
    """Tables of shards; picklable.

    Args:
        options: the folder of the cache.
        labelled: see :func:`~maskmatch_scale.data.shards.tar.read_table`.
    """

    def __init__(self, options: FetchOptions, *, labelled: bool) -> None:
        self._options, self._labelled = options, labelled
        self._is_usable = True
        """Whether the folder can be read and written to, as far as is known."""

    def read(self, file: FileIO, shard: str, cached: str | None) -> TarTable:
        """The table of a shard that is open: from a file, or from its headers; then the file is written.

        Args:
            file: the shard.
            shard: its name in messages.
            cached: its name in the cache; None: it is local.

        Raises:
            BadSample: the shard cannot be read, or is no tar.
        """
        identity = self._identity(file, shard, cached)
        if identity is None or not self._is_usable:
            return read_table(file, shard, labelled=self._labelled)
        place: _Place | None = None
        with ExitStack() as alone:
            try:
                place = self._place(identity, cached)
                if (found := self._found(place, identity, shard)) is not None:
                    return found
                alone.enter_context(place.alone())
                if (found := self._found(place, identity, shard)) is not None:  # another process has made it meanwhile
                    return found
            except (DataError, OSError):
                place, self._is_usable = None, False
            table = read_table(file, shard, labelled=self._labelled)
            if place is not None and self._identity(file, shard, cached) == identity:
                try:
                    place.keep(packed(table, identity))
                except (DataError, OSError):
                    self._is_usable = False
        return table

    def _identity(self, file: FileIO, shard: str, cached: str | None) -> bytes | None:
        """32 bytes that tell a shard from others, and from what takes its place; None if nothing does for certain."""
        status = os.fstat(file.fileno())
        facts: list[object] = [self._labelled, cached or shard, status.st_dev, status.st_ino, status.st_size]
        if cached is None:
            if time.time() - status.st_mtime < _SETTLED_S:
                return None
            facts.append(status.st_mtime_ns)
        elif not cached.startswith("sha256-"):  # its time says when it was used
            if (digest := fetched_digest(file)) is None:
                return None
            facts.append(digest)
        return hashlib.sha256(json.dumps(facts).encode()).digest()

    def _place(self, identity: bytes, cached: str | None) -> _Place:
        cache, limit = self._options.cache, self._options.limit_bytes
        if cached is not None:
            return _BesideShard(CacheFolder(cache, limit), cached, "labelled" if self._labelled else "unlabelled")
        return _OfLocalShard(CacheFolder(cache / _LOCAL, limit), f"sha256-{identity.hex()}")

    def _found(self, place: _Place, identity: bytes, shard: str) -> TarTable | None:
        data = place.content()
        return None if data is None else unpacked(data, identity, shard, labelled=self._labelled)


class _Place(Protocol):
    """Where the table of a shard is kept."""

    def content(self) -> bytes | None:
        """The file's; None if there is none."""

    def keep(self, content: bytes) -> None:
        """Write the file."""

    def alone(self) -> AbstractContextManager[object]:
        """Keeps other processes from making it while a body runs."""


@dataclass(frozen=True)
class _BesideShard:
    folder: CacheFolder
    shard: str
    kind: str

    def content(self) -> bytes | None:
        return self.folder.read_beside(self.shard, self.kind)

    def keep(self, content: bytes) -> None:
        self.folder.keep_beside(self.shard, self.kind, content)

    def alone(self) -> AbstractContextManager[object]:
        return self.folder.only_one(f"{self.shard}.{self.kind}")


@dataclass(frozen=True)
class _OfLocalShard:
    folder: CacheFolder
    name: str

    def content(self) -> bytes | None:
        file = self.folder.open(self.name)  # which notes that it was used
        if file is None:
            return None
        with file:
            return file.read()

    def keep(self, content: bytes) -> None:
        path = self.folder.path / f".{self.name}.{secrets.token_hex(8)}.part"
        try:
            path.write_bytes(content)
            path.replace(self.folder.path / self.name)
        finally:
            path.unlink(missing_ok=True)
        if secrets.randbelow(_PRUNED_EVERY) == 0:
            self.prune()

    def alone(self) -> AbstractContextManager[object]:
        return self.folder.only_one(self.name)

    def prune(self) -> None:
        """If there are too many, or they are too large, remove those that were used least recently, to half of that."""
        found = []
        with os.scandir(self.folder.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    found.append((status.st_mtime, status.st_size, entry.path))
        size, count = sum(size for _, size, _ in found), len(found)
        if size <= _MOST_LOCAL_BYTES and count <= _MOST_LOCAL:
            return
        for _, bytes_, path in sorted(found):
            if size <= _MOST_LOCAL_BYTES // 2 and count <= _MOST_LOCAL // 2:
                return
            with suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108 - as scandir gives it
            size, count = size - bytes_, count - 1


def packed(table: TarTable, identity: bytes) -> bytes:
    """The content of a file.

    Args:
        table: of a shard.
        identity: 32 bytes that tell the shard from others.
    """
    spans, key_ends, keys, faults, damage = table.parts()
    told = json.dumps([damage, [[place, *fault] for place, fault in faults.items()]]).encode()
    head = _HEAD.pack(_MAGIC, identity, len(spans), len(keys), len(told))
    data = b"".join((head, spans.astype("<i8").tobytes(), key_ends.astype("<i8").tobytes(), keys, told))
    return data + struct.pack("<I", crc32(data))


def unpacked(data: bytes, identity: bytes, shard: str, *, labelled: bool) -> TarTable | None:
    """The table in a file; None if it is damaged, or of another shard.

    Args:
        data: the content of the file.
        identity: of the shard.
        shard: its name in messages.
        labelled: whether its samples have label maps.
    """
    if len(data) < _HEAD.size + 4:
        return None
    magic, of, count, keys_size, told_size = _HEAD.unpack_from(data)
    if (magic, of) != (_MAGIC, identity) or len(data) != _HEAD.size + 40 * count + keys_size + told_size + 4:
        return None
    if struct.unpack("<I", data[-4:])[0] != crc32(data[:-4]):
        return None
    spans = np.frombuffer(data, "<i8", 4 * count, _HEAD.size).reshape(-1, 4)
    key_ends = np.frombuffer(data, "<i8", count, _HEAD.size + 32 * count)
    keys_at = _HEAD.size + 40 * count
    damage, listed = json.loads(data[keys_at + keys_size : -4])
    faults = {place: (reason, what) for place, reason, what in listed}
    return TarTable.of_parts(shard, labelled, spans, key_ends, data[keys_at : keys_at + keys_size], faults, damage)
