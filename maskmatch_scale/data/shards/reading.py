"""Reading the encoded samples of a stream by their place, from local and from remote shards.

The place of a sample is (shard, number within the shard). A remote shard is fetched whole into a cache on this machine.
Each process reads the headers of a shard once; after that, a sample costs one seek.

Decision: docs/decisions/0001-random-access-to-shards.md.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.remote.address import join
from maskmatch_scale.data.remote.fetch import read_bytes
from maskmatch_scale.data.remote.shard_cache import ShardCache
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardIndex
from maskmatch_scale.data.shards.tar import TarTable, read_table
from maskmatch_scale.recipe import DataRecipe
from maskmatch_scale.redact import is_remote, shown

MOST_CHECKED_AT_START = 10_000
"""If a stream has no more local shards, it is checked when it is opened that they exist and have their sizes. For more
that would take too long; then each shard is checked when it is read."""

_MOST_OPEN = 128
"""Shards that a process keeps open."""


@dataclass(frozen=True)
class RawSample:
    """One sample as it is in its shard, still encoded."""

    key: str
    shard: str
    image: bytes
    label: bytes | None

    @property
    def name(self) -> str:
        """Shard and key, for messages."""
        return f"{shown(self.shard)}: {self.key}"


def fetch_options(data: DataRecipe) -> FetchOptions:
    """The options of a recipe for fetching remote shards."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return FetchOptions(
        cache=Path(data.cache_dir) if data.cache_dir else home / "maskmatch_scale" / "shards",
        limit_bytes=int(data.cache_gb * 1e9),
        timeout_s=data.fetch_timeout_s,
        attempts=data.fetch_attempts,
        allow_pipe=data.allow_pipe,
    )


def load_index(root: str, data: DataRecipe | None = None) -> ShardIndex:
    """Read the index of a shard folder.

    Args:
        root: path or address of a folder, or of the index itself.
        data: how it is fetched if it is remote; None = by the defaults.

    Raises:
        DataError: there is none, it cannot be fetched, or it does not parse.
    """
    if not is_remote(root):
        return _local_index(root, _modified(root))
    where = root if root.partition("?")[0].endswith(".json") else join(root, INDEX_NAME)
    return ShardIndex.parse(read_bytes(where, fetch_options(data or DataRecipe(root=root))), shown(where))


@dataclass(frozen=True)
class ShardOpener:
    """Opens shards of a folder by their names in its index; picklable.

    Args:
        root: path or address of the folder or of its index.
        data: how remote shards are fetched; None = by the defaults.
    """

    root: str
    data: DataRecipe | None = None

    def __call__(self, file: str) -> BinaryIO:
        """Open the shard that the index calls ``file``.

        Raises:
            OSError: it is local and does not exist.
            DataError: it is remote and cannot be fetched.
        """
        location = join(self.root, file)
        if is_remote(location):
            return ShardCache(fetch_options(self.data or DataRecipe(root=self.root))).open(location)
        if not Path(location).is_file():  # opening a named pipe would wait for ever
            raise FileNotFoundError(f"{location}: the index names this shard but the file is not there")
        return Path(location).open("rb")


def _modified(root: str) -> tuple[int, int]:
    """Modification time (ns) and size (bytes) of a local index. If one of them has changed, the index is read again."""
    path = Path(root) if root.endswith(".json") else Path(root) / INDEX_NAME
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=2)
def _local_index(root: str, modified: tuple[int, int]) -> ShardIndex:
    """Cached, because each evaluation asks for the index, and reading one of a million shards takes seconds."""
    return ShardIndex.load(root)


class ShardStream:
    """Random access to the encoded samples of one stream of a shard folder.

    Args:
        root: path or address of the shard folder.
        name: the stream's name in the index.
        data: how remote shards are fetched; None = by the defaults.
        index: of the folder, if it was read already.
        labels: whether label maps are read; None = as the index says.
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
        self.strict = strict
        self._options = fetch_options(data)
        self._open: OrderedDict[int, tuple[BinaryIO, TarTable] | BadSample] = OrderedDict()
        self._process = os.getpid()
        if strict and len(self.shards) <= MOST_CHECKED_AT_START:
            for number in range(len(self.shards)):
                if not is_remote(self.location(number)):
                    self._check(number)

    def __len__(self) -> int:
        """Number of samples."""
        return self.entry.samples

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, which another process cannot use."""
        return self.__dict__ | {"_open": OrderedDict()}

    @cached_property
    def cache(self) -> ShardCache:
        """The cache of remote shards; its folder is made at the first use."""
        return ShardCache(self._options)

    def location(self, shard: int) -> str:
        """Path or address of a shard."""
        return join(self.root, self.shards.file(shard))

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, number within it) of sample ``number`` of the stream."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)} in stream {self.name!r}")
        return self.shards.locate(number)

    def __getitem__(self, number: int) -> RawSample:
        """Read sample ``number`` of the stream; see :meth:`read`."""
        return self.read(*self.locate(number))

    def read(self, shard: int, place: int) -> RawSample:
        """Read sample number ``place`` of a shard.

        Raises:
            BadSample: the sample, or its whole shard, cannot be used.
            DataError: with ``strict``: the shard is not as the index says.
        """
        file, table = self._table(shard)
        name = self.shards.file(shard)
        if place >= len(table):
            reason = "truncated" if table.truncated else "shard_unreadable"
            said = f"{len(table)} samples where the index says {int(self.shards.samples[shard])}"
            raise BadSample(reason, f"{shown(self.location(shard))}: {said}; write the shard again")
        image, label = table.read(file, place)
        return RawSample(table.key(place), name, image, label)

    def key(self, shard: int, place: int) -> str | None:
        """The key of a sample; None if the headers of its shard cannot be read that far."""
        try:
            _, table = self._table(shard)
        except BadSample:
            return None
        return table.key(place) if place < len(table) else None

    def prefetch(self, shard: int) -> bool:
        """Fetch a remote shard in the background; False if too many are being fetched: ask again later."""
        location = self.location(shard)
        if not is_remote(location):
            return True
        return self.cache.prefetch(location, int(self.shards.bytes[shard]), self.shards.sha256(shard))

    def _table(self, shard: int) -> tuple[BinaryIO, TarTable]:
        """A shard, open, and its table; it is kept open."""
        if self._process != os.getpid():
            # Files that a parent process opened share their positions with it: a forked process opens its own.
            self._process, self._open = os.getpid(), OrderedDict()
        found = self._open.get(shard)
        if found is None:
            try:
                found = self._read_table(shard)
            except BadSample as bad:
                found = bad  # kept, so that the shard is not tried again for each of its samples
            while len(self._open) >= _MOST_OPEN:
                _, oldest = self._open.popitem(last=False)
                if not isinstance(oldest, BadSample):
                    oldest[0].close()
            self._open[shard] = found
        self._open.move_to_end(shard)
        if isinstance(found, BadSample):
            raise found
        return found

    def _read_table(self, shard: int) -> tuple[BinaryIO, TarTable]:
        """Open a shard, and read its table."""
        location, said = self.location(shard), int(self.shards.samples[shard])
        if is_remote(location):
            file = self.cache.open(location, int(self.shards.bytes[shard]), self.shards.sha256(shard))
        else:
            if self.strict:
                self._check(shard)
            try:
                file = Path(location).open("rb")  # noqa: SIM115 - kept open
            except OSError as error:
                raise BadSample("shard_unreadable", f"{location}: {error.strerror}; write the shard again") from None
        table = read_table(file, shown(location), labelled=self.labels)
        if self.strict and len(table) != said:
            found = f"{len(table)} samples where the index says {said}"
            raise DataError(f"{shown(location)}: {found}; write the shard again")
        return file, table

    def _check(self, shard: int) -> None:
        """Raise a DataError if a local shard does not exist or has another size than the index says."""
        path, said = Path(self.location(shard)), int(self.shards.bytes[shard])
        if not path.is_file():
            raise DataError(f"{path}: the index names this shard but the file is not there; write the shards again")
        if (size := path.stat().st_size) != said:
            raise DataError(f"{path}: {size} bytes where the index says {said}; write the shards again")
