"""Reading the encoded samples of a stream by their place, from local and from remote shards.

The place of a sample is (shard, number within the shard). A remote shard is fetched whole into a cache on this machine.
A process of this machine reads the headers of a shard, and others what it has found
(:mod:`~maskmatch_scale.data.shards.tables`); after that, a sample is one read. A local shard stays open, as far as
descriptors allow (:mod:`~maskmatch_scale.data.shards.open_files`); one in the cache is opened for each sample, which
takes some microseconds, so that the bound of the cache holds for the disk too.

Decision: docs/decisions/0001-random-access-to-shards.md.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import BadSample, DataError, NotFetched
from maskmatch_scale.data.images.remap import Remap
from maskmatch_scale.data.node_arrays import NodeArrays
from maskmatch_scale.data.remote.address import join
from maskmatch_scale.data.remote.shard_cache import Fetched, ShardCache, cached_name
from maskmatch_scale.data.shards.folder import fetch_options, load_index
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.open_files import keep_open, with_descriptors
from maskmatch_scale.data.shards.range_reads import RangeReads
from maskmatch_scale.data.shards.stored import of_node
from maskmatch_scale.data.shards.tables import TableFiles
from maskmatch_scale.data.shards.tar import TarTable, read_table
from maskmatch_scale.recipe import DataRecipe
from maskmatch_scale.redact import is_remote, shown

MOST_CHECKED_AT_START = 10_000
"""If a stream has no more local shards, it is checked when it is opened that they exist and have their sizes. For more
that would take too long; then each shard is checked when it is read."""

_TABLES_KEPT = 128
"""Shards of a stream whose headers a process keeps in memory."""

Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class RawSample:
    """One sample as it is in its shard, still encoded."""

    key: str
    shard: str
    image: bytes
    label: bytes | None
    remap: Remap | None = None
    """What the values of the label map become; None: they stay."""

    @property
    def name(self) -> str:
        """Shard and key, for messages."""
        return f"{shown(self.shard)}: {self.key}"


@lru_cache(maxsize=4096)
def _place(root: str, file: str) -> tuple[str, bool]:
    """Path or address of a shard, and whether it is an address; each sample asks for it."""
    location = join(root, file)
    return location, is_remote(location)


class ShardStream:
    """Random access to the encoded samples of one stream of a shard folder.

    Args:
        root: path or address of the shard folder.
        name: the stream's name in the index.
        data: how remote shards are fetched; None = by the defaults.
        index: of the folder, if it was read already.
        labels: whether label maps are read; None = as the index says.
        images: whether images are read; otherwise those of all samples are empty.
        strict: whether a shard that is not as the index says is an error. If not, only those of its samples that
            cannot be read are bad.

    Raises:
        DataError: there is no such stream; labels are wanted and it has none; with ``strict`` also: a local shard is
            missing, or has another size than the index says.
    """

    def __init__(
        self,
        root: str | Path,
        name: str,
        data: DataRecipe | None = None,
        *,
        index: ShardIndex | None = None,
        labels: bool | None = None,
        images: bool = True,
        strict: bool = True,
    ) -> None:
        self.root = str(root)
        self.name = name
        data = data or DataRecipe(root=self.root)
        self.index = index or load_index(self.root, data)
        if name not in self.index.streams:
            there = ", ".join(self.index.streams)
            raise DataError(f"{shown(self.root)}: stream {name!r} is not in its index, which has {there}")
        self.entry = self.index.streams[name]
        self.shards = self.entry.shards
        self.labels = self.entry.labelled if labels is None else labels
        if self.labels and not self.entry.labelled:
            raise DataError(f"{shown(self.root)}: stream {name!r} has no labels")
        self.images = images
        self.strict = strict
        self._options = fetch_options(data)
        self.arrays: NodeArrays | None = of_node(self._options)
        """What the processes of this node share; None: nothing."""
        self._table_files = TableFiles(self._options, labelled=self.labels)
        self._ranges = RangeReads(self.root, self.index, self.shards, self._options, labelled=self.labels)
        self._tables: OrderedDict[int, TarTable | BadSample] = OrderedDict()
        self._good: dict[int, int] = {}
        """Cached shards that had a bad sample and were compared with their checksum: the inode of the good file."""
        if strict and len(self.shards) <= MOST_CHECKED_AT_START:
            for number in range(len(self.shards)):
                if not is_remote(self.location(number)):
                    self._check(number)

    def __len__(self) -> int:
        """Number of samples."""
        return self.entry.samples

    def __getstate__(self) -> dict[str, Any]:
        """Without the tables, which another process reads for itself."""
        return self.__dict__ | {"_tables": OrderedDict()}

    @cached_property
    def cache(self) -> ShardCache:
        """The cache of remote shards; its folder is made at the first use."""
        return ShardCache(self._options)

    def location(self, shard: int) -> str:
        """Path or address of a shard."""
        return _place(self.root, self.shards.file(shard))[0]

    def _version(self, shard: int) -> tuple[str, str | None, str | None]:
        """Path or address, checksum and ETag of a shard, by which the cache knows it."""
        return self.location(shard), self.shards.sha256(shard), self.shards.etag(shard)

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, number within it) of sample ``number`` of the stream."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)} in stream {self.name!r}")
        return self.shards.locate(number)

    def __getitem__(self, number: int) -> RawSample:
        """Read sample ``number`` of the stream; see :meth:`read`."""
        return self.read(*self.locate(number))

    def load(
        self, shard: int, place: int, prepare: Callable[[RawSample], Prepared], *, patience_s: float = math.inf
    ) -> Prepared:
        """Read sample number ``place`` of a shard, and prepare it.

        While its shard is being fetched, a sample is read by its range, if that is known; one that then cannot be used
        is read from the whole shard.

        If that fails and the shard lies in the cache, its bytes are compared with the checksum. A shard that was
        damaged there is fetched again. Each file is compared once, however many of its samples are bad.

        Args:
            shard: its number.
            place: number within it.
            prepare: decodes a sample; raises BadSample.
            patience_s: see :meth:`ShardCache.open`.

        Raises:
            BadSample: the sample, or its whole shard, cannot be used.
            DataError: with ``strict``: the shard is not as the index says.
        """
        file, (_, elsewhere) = self.shards.file(shard), _place(self.root, self.shards.file(shard))
        if elsewhere and self.images and patience_s > 0 and shard not in self._tables:
            sample = self._ranges.sample(shard, place, self.cache)
            if sample is not None:
                with suppress(BadSample):
                    return prepare(RawSample(sample[0], file, *sample[1:], self.index.remap))
        try:
            return prepare(self.read(shard, place, patience_s=patience_s))
        except DataError:
            if not self._may_be_mended(shard):
                raise
        return prepare(self.read(shard, place, patience_s=patience_s))

    def _may_be_mended(self, shard: int) -> bool:
        """After a fault: whether the shard should be read once more. If it is damaged it is dropped from the cache."""
        location, sha256, etag = self._version(shard)
        inode = self.cache.inode(location, sha256, etag) if is_remote(location) else None
        if inode is None or inode == self._good.get(shard):
            return False
        if not self.cache.drop_if_damaged(location, sha256, etag):
            # Read again all the same: another process may have mended it since its headers were read here.
            self._good[shard] = inode
        self._tables.pop(shard, None)
        return True

    def read(self, shard: int, place: int, *, patience_s: float = math.inf) -> RawSample:
        """Read sample number ``place`` of a shard.

        Raises:
            BadSample: the sample, or its whole shard, cannot be used.
            DataError: with ``strict``: the shard is not as the index says.
        """
        with self._opened(shard, patience_s) as file:
            table = self._table(shard, file)
            name = self.shards.file(shard)
            said = int(self.shards.samples[shard])
            # Of a shard with more samples than the index says, the last place stands for those that are never read.
            if place >= len(table) or (place == said - 1 and len(table) > said):
                reason = "truncated" if table.truncated else "wrong_count"
                raise BadSample(reason, f"{shown(self.location(shard))}: {_other_count(table, said)}")
            image, label = table.read(file, place)
        return RawSample(table.key(place), name, image, label, self.index.remap)

    def key(self, shard: int, place: int) -> str | None:
        """The key of a sample; None if the headers of its shard were not read, or not that far."""
        table = self._tables.get(shard)
        return table.key(place) if isinstance(table, TarTable) and place < len(table) else None

    def prefetch(self, shard: int) -> bool:
        """Fetch a remote shard in the background; False if too many are being fetched: ask again later."""
        location = self.location(shard)
        if not is_remote(location):
            return True
        return self.cache.prefetch(
            location, self.shards.size(shard), self.shards.sha256(shard), self.shards.etag(shard)
        )

    def identities(self) -> NDArray[np.uint8]:
        """What tells its samples from others, see :meth:`ShardTable.identities`."""
        return self.shards.identities()

    def shards_here(self) -> list[int]:
        """The shards that can be read without fetching any."""
        local = [number for number in range(len(self.shards)) if not is_remote(self.location(number))]
        if len(local) == len(self.shards):
            return local
        cached = self.cache.are_here(map(self._version, range(len(self.shards))))
        return sorted({*local, *cached})

    @property
    def arrivals(self) -> int:
        """How many shards have come from elsewhere since this process began."""
        return self.cache.arrivals if "cache" in self.__dict__ else 0

    def take_figures(self) -> Fetched:
        """What was fetched in this process since the last call."""
        return self.cache.take_figures() if "cache" in self.__dict__ else Fetched()

    @contextmanager
    def _opened(self, shard: int, patience_s: float) -> Iterator[FileIO]:
        """A shard, open while the body runs.

        Raises:
            BadSample: it cannot be opened, or could not be read before.
            DataError: with ``strict``: see :meth:`_check`.
        """
        location, elsewhere = _place(self.root, self.shards.file(shard))
        known = self._tables.get(shard)
        if not elsewhere:
            yield self._local(shard, location)
            return
        if isinstance(known, NotFetched):
            patience_s = 0  # it may have been fetched in the background since
        elif isinstance(known, BadSample):
            raise known
        size, sha256, etag = self.shards.size(shard), self.shards.sha256(shard), self.shards.etag(shard)
        try:
            file = with_descriptors(partial(self.cache.open, location, size, sha256, etag, patience_s=patience_s))
        except NotFetched as error:
            if patience_s > 0:
                self._keep(shard, error)  # so that it is not tried again for each of its samples
            raise known if isinstance(known, NotFetched) else error from None
        if isinstance(known, NotFetched):
            del self._tables[shard]
        with file:
            yield file

    def _local(self, shard: int, location: str) -> FileIO:
        """A local shard; it stays open."""
        known = self._tables.get(shard)
        if isinstance(known, BadSample):
            raise known
        if self.strict and known is None:
            self._check(shard)
        try:
            return keep_open(location)
        except OSError as error:
            bad = BadSample("shard_unreadable", f"{location}: {error.strerror}; write the shard again")
            self._keep(shard, bad)
            raise bad from None

    def _table(self, shard: int, file: FileIO) -> TarTable:
        """The table of a shard; it is kept."""
        found = self._tables.get(shard)
        if found is None:
            said = int(self.shards.samples[shard])
            try:
                found = self.read_table(shard, file)
            except BadSample as bad:
                self._keep(shard, bad)
                raise
            if self.strict and len(found) != said:
                raise DataError(f"{shown(self.location(shard))}: {_other_count(found, said)}")
            self._keep(shard, found)
        assert isinstance(found, TarTable)
        self._tables.move_to_end(shard)
        return found

    def read_table(self, shard: int, file: FileIO) -> TarTable:
        """Read the headers of a shard that is open.

        Raises:
            BadSample: it cannot be read, or is no tar.
        """
        where = shown(self.location(shard))
        if not self.images:  # tables that are kept are of samples with images
            return read_table(file, where, labelled=self.labels, images=False)
        cached = cached_name(*self._version(shard)) if is_remote(self.location(shard)) else None
        return self._table_files.read(file, where, cached)

    def _keep(self, shard: int, found: TarTable | BadSample) -> None:
        while len(self._tables) >= _TABLES_KEPT:
            self._tables.popitem(last=False)
        self._tables[shard] = found

    def _check(self, shard: int) -> None:
        """Raise a DataError if a local shard does not exist or has another size than the index says."""
        path, said = Path(self.location(shard)), self.shards.size(shard)
        if not path.is_file():
            raise DataError(f"{path}: the index names this shard but the file is not there; write the shards again")
        if said is not None and (size := path.stat().st_size) != said:
            raise DataError(f"{path}: {size} bytes where the index says {said}; write the shards again")


def _other_count(table: TarTable, said: int) -> str:
    """What is wrong with a shard of another number of samples than the index says, and what to do."""
    return (
        f"{len(table)} samples where the index says {said}; write the shard again, or index it again "
        "(`maskmatch shards index … --scan`)"
    )
