"""The index of a shard folder: its streams, and the shards of each.

A shard folder holds webdataset tar shards and one ``index.json``::

    data/scores/
      index.json
      labelled-000000.tar      members: <key>.jpg <key>.png   (image, label map), keys adjacent
      unlabelled-000000.tar    members: <key>.jpg             (no labels at all)

A stream is a named list of shards. In memory the list is kept in columns. So a shard takes about a hundred bytes in
memory (a few hundred in the file), which matters for a million shards, and forked loader processes share that memory.

Decision: docs/decisions/0001-random-access-to-shards.md.
Decision: docs/decisions/0064-counts-of-others.md.
"""

from __future__ import annotations

import builtins
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from maskmatch_scale.data.faults import DataError, NotShards
from maskmatch_scale.data.images.bands import Band
from maskmatch_scale.data.images.remap import Remap, remap_classes
from maskmatch_scale.data.node_arrays import Arrays
from maskmatch_scale.data.shards.columns import SHA256_BYTES, TableReference, Texts, read_table_file
from maskmatch_scale.redact import PIPE, shown

INDEX_NAME = "index.json"
FORMAT = 1
FORMAT_WITH_TABLES = 2
"""Of an index that names a file for the shards of a large stream, in place of listing them."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Frozen):
    """One tar file of a stream."""

    file: str
    """Path relative to the index, absolute path, or address."""
    samples: int = Field(ge=1)
    bytes: int | None = Field(default=None, ge=1)
    """Its size; None = not known."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Hex digest of its bytes; None = not known."""
    etag: str | None = Field(default=None, min_length=1)
    """Strong ETag that its server gave; None = not known."""


_FIELDS = frozenset(ShardEntry.model_fields)


class ShardTable(Sequence[ShardEntry]):
    """The shards of a stream, in columns: a sequence of :class:`ShardEntry`, each made when it is asked for.

    Args:
        entries: for each shard a mapping, as in ``index.json``, or a :class:`ShardEntry`.

    Raises:
        ValueError: an entry lacks a field, has an unknown one, or has one of a wrong type or range; names the entry.
    """

    samples: NDArray[np.int64]
    """int64 (shards,): samples per shard."""
    bytes: NDArray[np.int64]
    """int64 (shards,): bytes per shard; 0 where they are not known."""
    starts: NDArray[np.int64]
    """int64 (shards + 1,): number in the stream of the first sample of each shard; last, the number of samples."""

    def __init__(self, entries: Iterable[Mapping[str, Any] | ShardEntry]) -> None:
        rows = [entry.model_dump() if isinstance(entry, ShardEntry) else entry for entry in entries]
        try:
            files = [row["file"].encode() for row in rows]
            self.samples = np.array([row["samples"] for row in rows], dtype=np.int64)
            sizes = [row.get("bytes") for row in rows]
            self.bytes = np.array([0 if size is None else size or -1 for size in sizes], dtype=np.int64)
            hexes = [row.get("sha256") for row in rows]
            digests = b"".join([bytes(SHA256_BYTES) if digest is None else bytes.fromhex(digest) for digest in hexes])
            etags = [row.get("etag") for row in rows]
            encoded = [b"" if etag is None else etag.encode() for etag in etags]
            well_formed = (
                len(digests) == SHA256_BYTES * len(rows)
                and all(row.keys() <= _FIELDS for row in rows)
                and bool((self.samples >= 1).all() and (self.bytes >= 0).all())
                and all(files)
                and "" not in etags
                and all(isinstance(row["samples"], int) for row in rows)
                and all(size is None or isinstance(size, int) for size in sizes)
            )
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            well_formed = False
        if not well_formed:
            raise ValueError(_first_fault(rows))
        self._files = Texts.of(files)
        self._etags = Texts.of(encoded) if any(encoded) else None
        self._has_digest: NDArray[np.bool_] = np.array([digest is not None for digest in hexes], dtype=np.bool_)
        self._digests = np.frombuffer(digests if self._has_digest.any() else b"", dtype=np.uint8)
        self.starts = _starts(self.samples)
        self._identities: NDArray[np.uint8] | None = None

    @classmethod
    def of_columns(cls, columns: Arrays) -> ShardTable:
        """The table that has these :meth:`columns`; they are not checked again, and not copied."""
        table = cls.__new__(cls)
        table.samples, table.bytes = columns["samples"], columns["bytes"]
        table._files = Texts(columns["files"], columns["file_ends"])
        table._etags = Texts(columns["etags"], columns["etag_ends"]) if "etags" in columns else None
        table._has_digest, table._digests = columns["has_sha256"], columns["sha256"]
        table.starts = columns["starts"] if "starts" in columns else _starts(table.samples)
        table._identities = columns.get("identities")
        return table

    def columns(self) -> Arrays:
        """The columns of a file of this table (:mod:`~maskmatch_scale.data.shards.columns`)."""
        files, etags = self._files, self._etags
        known = {"samples": self.samples, "bytes": self.bytes, "has_sha256": self._has_digest, "sha256": self._digests}
        of_etags: Arrays = {} if etags is None else {"etags": etags.joined, "etag_ends": etags.ends}
        return {"files": files.joined, "file_ends": files.ends, **known, **of_etags}

    def all_columns(self) -> Arrays:
        """The columns, and those that are computed from them."""
        identities = {} if self._has_digest.all() else {"identities": self.identities()}
        return {**self.columns(), "starts": self.starts, **identities}

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.samples)

    def file(self, number: int) -> str:
        """File of shard ``number``, as it is in the index."""
        return self._files[number]

    @property
    def has_addresses(self) -> bool:
        """Whether some file may be an address and not a path: it has a colon."""
        return re.search(b":", self._files.joined.data) is not None  # without a copy

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, number within it) of a sample, from its number in the stream."""
        shard = int(self.starts.searchsorted(sample, side="right")) - 1
        return shard, sample - int(self.starts[shard])

    def size(self, number: int) -> int | None:
        """Bytes of shard ``number``; None = not known."""
        return int(self.bytes[number]) or None

    def sha256(self, number: int) -> str | None:
        """Hex digest of shard ``number``; None = not known."""
        if not self._has_digest[number]:
            return None
        return self._digests.data[number * SHA256_BYTES : (number + 1) * SHA256_BYTES].hex()

    def etag(self, number: int) -> str | None:
        """Strong ETag of shard ``number``; None = not known."""
        return (self._etags[number] or None) if self._etags is not None else None

    def identities(self) -> NDArray[np.uint8]:
        """What tells each shard from one with other bytes: uint8 (shards · 32,).

        That is its SHA-256. Where it is not known, the name of the shard in the index, its size and its ETag stand in.
        Secrets in an address do not count: they may be new each day.
        """
        if self._has_digest.all():
            return self._digests
        return (
            np.frombuffer(b"".join(self._each_identity()), np.uint8) if self._identities is None else self._identities
        )

    def _each_identity(self) -> Iterator[builtins.bytes]:
        # Written for a million shards, which take two seconds. Few names have anything that is not shown.
        names, digests = self._files.joined.tobytes(), self._digests.tobytes()
        is_shown = not any(mark in names for mark in (b"@", b"?", b"#", PIPE.encode()))
        encode, sha256 = json.JSONEncoder().encode, hashlib.sha256
        etags: Iterable[str | None] = itertools.repeat(None) if self._etags is None else self._etags
        rows = zip(self._has_digest.tolist(), self._files, self.bytes.tolist(), etags, strict=False)
        for number, (known, file, size, etag) in enumerate(rows):
            if known:
                yield digests[number * SHA256_BYTES : (number + 1) * SHA256_BYTES]
            else:
                facts = [file if is_shown else shown(file), size or None, etag or None]
                yield sha256(encode(facts).encode()).digest()

    @overload
    def __getitem__(self, number: int) -> ShardEntry: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[ShardEntry]: ...

    def __getitem__(self, number: int | slice) -> ShardEntry | Sequence[ShardEntry]:
        """Entry ``number``, or those of a slice."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        return ShardEntry.model_construct(
            file=self.file(number),
            samples=int(self.samples[number]),
            bytes=self.size(number),
            sha256=self.sha256(number),
            etag=self.etag(number),
        )

    def __eq__(self, other: object) -> bool:
        """Whether two tables list the same shards."""
        return isinstance(other, ShardTable) and self.as_json() == other.as_json()

    __hash__ = None  # type: ignore[assignment]

    def as_json(self) -> list[dict[str, Any]]:
        """The entries, as :meth:`__init__` takes them, without what is not known."""
        entries = []
        for number, (file, samples) in enumerate(zip(self._files, self.samples.tolist(), strict=True)):
            optional = {"bytes": self.size(number), "sha256": self.sha256(number), "etag": self.etag(number)}
            known = {name: value for name, value in optional.items() if value is not None}
            entries.append({"file": file, "samples": samples, **known})
        return entries

    def take(self, numbers: Sequence[int]) -> ShardTable:
        """The table of these shards alone, in this order."""
        at = np.array(numbers, dtype=np.int64)
        files, etags, has_digest = self._files.take(at), self._etags, self._has_digest[at]
        of_etags = None if etags is None else etags.take(at)
        digests = self._digests.reshape(-1, SHA256_BYTES)[at].ravel() if has_digest.any() else self._digests[:0]
        columns: dict[str, NDArray[Any]] = {"files": files.joined, "file_ends": files.ends, "sha256": digests}
        if of_etags is not None and len(of_etags.joined):
            columns |= {"etags": of_etags.joined, "etag_ends": of_etags.ends}
        numbers_of = {"samples": self.samples[at], "bytes": self.bytes[at], "has_sha256": has_digest}
        return ShardTable.of_columns({**columns, **numbers_of})


def _starts(samples: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(samples)])


def _first_fault(rows: Sequence[Any]) -> str:
    """The first entry that is not well formed, and why."""
    for number, row in enumerate(rows):
        try:
            ShardEntry.model_validate(row, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            return f"{number}.{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return "an entry is not what a shard's entry must be"


def _as_table(value: object) -> ShardTable:
    if isinstance(value, ShardTable):
        return value
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise ValueError("a list of shards is needed")
    return ShardTable(value)


class StreamEntry(_Frozen):
    """One named stream: its shards in order, and whether its samples carry label maps."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    labelled: bool
    shards: Annotated[ShardTable, PlainValidator(_as_table), PlainSerializer(ShardTable.as_json)]
    class_pixels: tuple[int, ...] | None = None
    """Pixels of each class in all label maps, and last those that are ignored; None = not known."""

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return int(self.shards.starts[-1])


class ShardIndex(_Frozen):
    """The contents of ``index.json``, and of the files that it names."""

    source: str
    """Name of the source that wrote the shards."""
    settings: dict[str, object] = {}
    """Settings of the source (seed, sizes …). A folder is only ever written further with the same settings."""
    classes: tuple[str, ...] = ()
    """Class names. Value v < len(classes) of a label map is class ``classes[v]``. Empty if no stream is labelled."""
    palette: tuple[tuple[int, int, int], ...] = ()
    """One RGB colour per class, 0–255, for pictures."""
    ignore_index: int = Field(default=255, ge=0, le=255)
    """Value of ignored pixels in a label map."""
    bands: tuple[Band, ...] = ()
    """What the pages of an image hold, in their order; empty: images are plain ones, read as RGB of 8 bits."""
    offsets: bool = False
    """Whether shards have side-cars that say where their samples begin
    (:mod:`~maskmatch_scale.data.shards.offsets`)."""
    part: str | None = Field(default=None, pattern=r"^[1-9]\d*/[1-9]\d*$")
    """Which part of a data set this is, as `2/4`, if several machines write it; None: all of it."""
    streams: dict[str, StreamEntry]
    _remap: Remap | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _sound(self) -> ShardIndex:
        if self.ignore_index < len(self.classes):
            raise ValueError(f"ignore_index {self.ignore_index} is also class {self.classes[self.ignore_index]!r}")
        if len({band.name for band in self.bands}) < len(self.bands):
            raise ValueError(f"bands: two have the same name, of {', '.join(band.name for band in self.bands)}")
        if len(self.palette) != len(self.classes):
            raise ValueError(f"palette: {len(self.palette)} colours for {len(self.classes)} classes")
        labelled = [name for name, stream in self.streams.items() if stream.labelled]
        if labelled and not self.classes:
            raise ValueError(f"classes: stream {labelled[0]!r} is labelled, but no class has a name")
        return self

    @classmethod
    def load(cls, root: str | Path) -> ShardIndex:
        """Read ``root/index.json``; ``root`` may also be the path of an index itself.

        Raises:
            DataError: no such folder (:class:`NotShards`), no index in it, or an index that does not parse.
        """
        root = Path(root)
        path = root if root.suffix == ".json" else root / INDEX_NAME
        if not path.parent.is_dir():
            raise NotShards(f"{root}: no such folder; write shards first (`maskmatch shards write --help`)")
        if not path.is_file():
            raise DataError(
                f"{path}: no index; an interrupted `maskmatch shards write` is finished by running it again"
            )
        return cls.parse(path.read_bytes(), str(path), lambda said: _local_table(path.parent / said.table, said))

    @classmethod
    def parse(
        cls, data: bytes, where: str, read_table: Callable[[TableReference], ShardTable] | None = None
    ) -> ShardIndex:
        """Read the bytes of an ``index.json``.

        Args:
            data: the bytes.
            where: names them in messages.
            read_table: reads the tables that it names; None: an index that names one is refused.

        Raises:
            DataError: they do not parse, or a table cannot be read.
        """
        try:
            content = json.loads(data)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}); write the shards again") from None
        try:
            if isinstance(content, dict):
                _check_format(content.pop("format", FORMAT), where)
                _read_tables(content, where, read_table)
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, first["loc"])) or "the file"
            message = first["msg"].removeprefix("Value error, ")
            raise DataError(f"{where}: {at}: {message}; write the shards again") from None

    def to_json(self, tables: Mapping[str, TableReference] = MappingProxyType({})) -> bytes:
        """What :meth:`parse` reads, with one line per shard.

        Args:
            tables: by stream, the files in which its shards are; those of the others are listed.
        """
        # Older versions do not know these fields.
        unsaid = {"streams"} | {name for name in ("offsets", "bands", "part") if not getattr(self, name)}
        content = {"format": FORMAT_WITH_TABLES if tables else FORMAT} | self.model_dump(mode="json", exclude=unsaid)
        head = json.dumps(content, indent=1, ensure_ascii=False)[:-2]
        parts = []
        for name, stream in self.streams.items():
            if name in tables:
                shards = json.dumps(tables[name].model_dump())
            else:
                shards = "[\n" + ",\n".join(f"   {json.dumps(shard)}" for shard in stream.shards.as_json()) + "\n  ]"
            facts = [f'"labelled": {json.dumps(stream.labelled)}']
            if stream.class_pixels is not None:
                facts.append(f'"class_pixels": {json.dumps(stream.class_pixels)}')
            parts.append(f"  {json.dumps(name)}: {{\n  " + ",\n  ".join([*facts, f'"shards": {shards}']) + "}")
        return f'{head},\n "streams": {{\n{",".join(parts)}\n }}\n}}\n'.encode()

    @property
    def remap(self) -> Remap | None:
        """How label maps become values of :attr:`classes`; None: as they are. See :meth:`remapped`."""
        return self._remap

    def remapped(self, remap: Mapping[str, str], *, strict: bool = True) -> ShardIndex:
        """The same index with the classes, colours and pixels of classes that `data.remap` makes of its own.

        Args:
            remap: see :func:`remap_classes`.
            strict: likewise.

        Raises:
            ValueError: likewise; or, if ``strict``, the index names no classes.
        """
        if strict and not self.classes:
            raise ValueError("data.remap: the index names no classes; write one that does (`maskmatch shards index`)")
        made = remap_classes(self.classes, self.palette, self.ignore_index, remap, strict=strict)
        streams = {
            name: stream
            if stream.class_pixels is None
            else stream.model_copy(update={"class_pixels": made.sums(stream.class_pixels)})
            for name, stream in self.streams.items()
        }
        new = self.model_copy(update={"classes": made.classes, "palette": made.palette, "streams": streams})
        new._remap = made
        return new

    def with_shards(self, stream: str, numbers: Sequence[int]) -> ShardIndex:
        """The same index with only these shards of a stream; the index itself if they are all shards."""
        entry = self.streams[stream]
        if np.array_equal(numbers, np.arange(len(entry.shards))):
            return self
        fewer = entry.model_copy(update={"shards": entry.shards.take(numbers), "class_pixels": None})
        return self.model_copy(update={"streams": {**self.streams, stream: fewer}})

    def stream(self, name: str) -> StreamEntry:
        """The stream called ``name``.

        Raises:
            DataError: there is none; the message names those that there are.
        """
        if name not in self.streams:
            raise DataError(f"stream {name!r} is not in the index; it has: {', '.join(self.streams)}")
        return self.streams[name]


def _check_format(number: object, where: str) -> None:
    if number not in (FORMAT, FORMAT_WITH_TABLES):
        raise DataError(
            f"{where}: format {number} is unknown; this version reads {FORMAT} and {FORMAT_WITH_TABLES}: use a newer "
            "one, or write the shards again"
        )


def _read_tables(
    content: dict[str, Any], where: str, read_table: Callable[[TableReference], ShardTable] | None
) -> None:
    """Put tables where the streams of an index name them."""
    streams = content.get("streams")
    for name, stream in streams.items() if isinstance(streams, dict) else ():
        if isinstance(stream, dict) and isinstance(said := stream.get("shards"), dict):
            if read_table is None:
                raise DataError(f"{where}: stream {name!r} is in {said.get('table')}, which is not read here")
            stream["shards"] = read_table(TableReference.model_validate(said))


def _local_table(path: Path, said: TableReference) -> ShardTable:
    return ShardTable.of_columns(read_table_file(path, said))
