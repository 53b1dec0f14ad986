"""The first samples of shards that are still being fetched: each is read by one request for its bytes.

When a run starts or continues, no shard is on this machine, and the first batch would wait for whole ones. Where the
offsets of samples are known (:mod:`~maskmatch_scale.data.shards.offsets`), a sample is a range of its shard. Meanwhile
the shard is fetched in the background, and as soon as it is there, it is used. What is not surely the sample of the
whole shard is not used: then the whole shard is waited for, and says what is wrong.

Such reads are bounded for each process, so that where shards come too slowly, a run waits for them, as it would
without offsets, and does not fetch an epoch by single samples.

Decision: docs/decisions/0071-first-samples-by-ranges.md.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from maskmatch_scale.data.faults import NotFetched
from maskmatch_scale.data.remote.address import join
from maskmatch_scale.data.remote.fetch import fetch_bytes, has_ranges, read_range
from maskmatch_scale.data.remote.shard_cache import Fetched, ShardCache
from maskmatch_scale.data.remote.transfer import FetchOptions, TransferError
from maskmatch_scale.data.shards.index import ShardIndex, ShardTable
from maskmatch_scale.data.shards.offsets import Offsets, energon_offsets, energon_side_car, side_car, unpacked
from maskmatch_scale.redact import is_remote, shown

_MOST_SAMPLES = 1024
"""Samples that a process reads so of a source, as long as it lives."""
_SHARE = 8
"""Of a shard, a process reads at most one byte in so many so."""
_TIMEOUT_S = 5.0
"""A sample that has not come by then is read from the whole shard, which has more patience."""
_KEPT = 128
"""Shards of which offsets are kept."""


class RangeReads:
    """Single samples of the shards of a stream; picklable.

    Args:
        root: path or address of the index.
        index: whose ``offsets`` says whether there are side-cars. Energon's are looked for where it wrote the index.
        shards: of the stream.
        options: how side-cars are fetched.
        labelled: whether samples have label maps.
    """

    def __init__(
        self, root: str, index: ShardIndex, shards: ShardTable, options: FetchOptions, *, labelled: bool
    ) -> None:
        self._root, self._shards, self._labelled = root, shards, labelled
        self._is_energon = index.source == "energon"
        self._left = _MOST_SAMPLES if index.offsets or self._is_energon else 0
        self._timeout_s = min(_TIMEOUT_S, options.timeout_s)
        self._options = replace(options, attempts=1, timeout_s=self._timeout_s)
        self._known: OrderedDict[int, Offsets | None] = OrderedDict()
        self._bytes_read: dict[int, int] = {}

    def sample(self, shard: int, place: int, cache: ShardCache) -> tuple[str, bytes, bytes | None] | None:
        """Read a sample by its range, if its shard is not here, and see that the shard is being fetched.

        Args:
            shard: its number in the stream.
            place: number of the sample within it.
            cache: of whole shards.

        Returns:
            Key, encoded image and label map, as the whole shard has them; None: read the whole shard.

        Raises:
            DataError: a library is missing.
        """
        if self._left <= 0:
            return None
        location = join(self._root, self._shards.file(shard))
        size, sha256, etag = self._shards.size(shard), self._shards.sha256(shard), self._shards.etag(shard)
        if not has_ranges(location) or cache.inode(location, sha256, etag) is not None:
            return None
        offsets = self._offsets(shard, location, cache.count)
        if offsets is None:
            return None
        start, stop = offsets.span(place)
        read = self._bytes_read.get(shard, 0) + stop - start
        if read > int(offsets.starts[-1]) // _SHARE:
            return None
        self._bytes_read[shard] = read
        self._left -= 1
        cache.prefetch(location, size, sha256, etag)
        began = time.monotonic()
        try:
            data = read_range(location, start, stop, size, etag, self._timeout_s)
        except TransferError as error:
            if error.final:
                self._known[shard] = None
            else:  # no ranges, or a slow network: whole shards get further
                self._left = 0
            return None
        cache.count(Fetched(bytes=len(data), seconds=time.monotonic() - began, ranges=1))
        found = offsets.sample(place, data, shown(location), labelled=self._labelled)
        if found is None:  # of another version of the shard, or damaged on the way
            self._known[shard] = None
        return found

    def _offsets(self, shard: int, location: str, count: Callable[[Fetched], None]) -> Offsets | None:
        """Where the samples of a shard begin; None if that is not known."""
        if shard not in self._known:
            while len(self._known) >= _KEPT:
                self._known.popitem(last=False)
            self._known[shard] = self._read_offsets(shard, location, count)
        return self._known[shard]

    def _read_offsets(self, shard: int, location: str, count: Callable[[Fetched], None]) -> Offsets | None:
        samples, size = int(self._shards.samples[shard]), self._shards.size(shard)
        if self._is_energon:
            where = energon_side_car(location)
            data = self._read(where, count) if where is not None else None
            return None if data is None else energon_offsets(data, samples, size)
        data = self._read(join(self._root, side_car(self._shards.file(shard))), count)
        return None if data is None else unpacked(data, samples, size, self._shards.sha256(shard))

    def _read(self, where: str, count: Callable[[Fetched], None]) -> bytes | None:
        """The content of a side-car; None if it cannot be read. No other one of a server is asked for then."""
        if not is_remote(where):
            with suppress(OSError):
                return Path(where).read_bytes()
            return None
        began = time.monotonic()
        try:
            data = fetch_bytes(where, self._options)
        except NotFetched:
            self._left = 0
            return None
        count(Fetched(bytes=len(data), seconds=time.monotonic() - began))
        return data
