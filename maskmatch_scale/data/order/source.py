"""One source of training samples: its shards, its order, and what stands in for a sample that cannot be used."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.order.epoch import EpochOrder, Place
from maskmatch_scale.data.order.mix import Part
from maskmatch_scale.data.remote.address import is_remote
from maskmatch_scale.data.shards.reading import RawSample, ShardStream
from maskmatch_scale.seeds import derive_seed

Prepared = TypeVar("Prepared")

_STAND_INS = 64
"""Samples that are tried in a bad one's place."""

_ORDERS_KEPT = 4
"""Epochs whose order is kept at hand: lanes are in the same one or in neighbouring ones."""

_WINDOWS_KEPT = 1024
"""Windows of which is known what was asked for."""


@dataclass(frozen=True)
class Skip:
    """A sample that was passed over."""

    source: str
    shard: str
    key: str | None
    reason: str
    message: str


class Source:
    """Samples of one stream of shards, for ever, in an order that depends on (seed, name, epoch, shards) alone.

    Args:
        stream: its shards.
        name: that its order is drawn from.
        seed: of the run.
        window: samples that are shuffled with each other.
        weight: share of the mix.
        skip: whether bad samples are passed over; else they are errors.
        numbers: int64, ascending: the samples of the stream that are used; None = all.
    """

    def __init__(
        self,
        stream: ShardStream,
        name: str,
        seed: int,
        window: int,
        *,
        weight: float = 1.0,
        skip: bool = False,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        self.stream = stream
        self.name = name
        self.seed = seed
        self.window = window
        self.skip = skip
        self.numbers = numbers
        self.sizes = stream.shards.samples
        self._first = stream.shards.starts
        if numbers is not None:
            self._first = np.searchsorted(numbers, stream.shards.starts)
            self.sizes = np.diff(self._first)
        self.part = Part(name, weight, int(self.sizes.sum()), self._digest())
        self._orders: OrderedDict[tuple[int, int], EpochOrder] = OrderedDict()
        self.elsewhere = is_remote(stream.root) or stream.shards.has_addresses
        """Whether its shards have to be fetched."""
        self._waiting: OrderedDict[tuple[int, int], list[int]] = OrderedDict()

    def _digest(self) -> str:
        digest = hashlib.blake2b(repr((self.seed, self.window)).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.sizes, dtype="<i8").tobytes())
        digest.update(self.stream.shards.digests)
        if self.numbers is not None:
            digest.update(np.ascontiguousarray(self.numbers, dtype="<i8").tobytes())
        return digest.hexdigest()

    def order(self, epoch: int, lanes: int) -> EpochOrder:
        """Order of an epoch that is dealt to so many lanes."""
        order = self._orders.get((epoch, lanes))
        if order is None:
            while len(self._orders) >= _ORDERS_KEPT:
                self._orders.popitem(last=False)
            order = EpochOrder(self.sizes, derive_seed(self.seed, "order", self.name, epoch), self.window, lanes)
            self._orders[epoch, lanes] = order
        return order

    def locate(self, place: Place) -> tuple[int, int]:
        """(shard, place within it) of the sample that stands at ``place``."""
        return self._within(*self.order(place.epoch, place.lanes)[place.place])

    def _within(self, shard: int, among_used: int) -> tuple[int, int]:
        if self.numbers is None:
            return shard, among_used
        number = int(self.numbers[int(self._first[shard]) + among_used])
        return shard, number - int(self.stream.shards.starts[shard])

    def load(self, place: Place, prepare: Callable[[RawSample], Prepared]) -> tuple[Prepared, list[Skip]]:
        """Read the sample at ``place`` and prepare it; if it is bad and may be skipped, one that stands in for it.

        Args:
            place: in the source's epochs.
            prepare: decodes and augments; raises BadSample.

        Returns:
            What ``prepare`` returned, and what was passed over: the sample that stands at ``place``, once, whatever was
            tried after it.

        Raises:
            BadSample: it is bad and this source skips nothing.
            DataError: neither it nor any that might stand in can be used.
        """
        skipped: list[Skip] = []
        tried, last = 0, ""
        for shard, within in self._candidates(place):
            tried += 1
            try:
                return prepare(self.stream.read(shard, within)), skipped
            except BadSample as bad:
                if not self.skip:
                    raise
                last = str(bad)
                if not skipped:
                    key = self.stream.key(shard, within)
                    skipped.append(Skip(self.name, self.stream.shards.file(shard), key, bad.reason, last))
        raise DataError(f"source {self.name!r}: {tried} samples in a row cannot be used; the last: {last}")

    def _candidates(self, place: Place) -> Iterator[tuple[int, int]]:
        """The sample at a place, then those that may stand in for it: a rule that looks at the place alone.

        First some of the sample's own window, in whatever order; then, in case that is one lost shard, of the window
        before or behind it in the run, whose shards a lane has just had or is about to need; at last of the epoch.
        """
        yield self.locate(place)
        order = self.order(place.epoch, place.lanes)
        tried = {place.place}
        for start, stop in (order.window_of(place.place), order.neighbouring_window(place.place), (0, len(order))):
            for attempt in range(_STAND_INS // 4):
                drawn = start + derive_seed(order.seed, "stands in", place.place, start, attempt) % (stop - start)
                if drawn not in tried:
                    tried.add(drawn)
                    yield self._within(*order[drawn])

    def prefetch(self, place: Place) -> None:
        """Fetch the shards of the window around ``place`` in the background."""
        order = self.order(place.epoch, place.lanes)
        start, stop = order.window_of(place.place)
        waiting = self._waiting.setdefault((place.epoch, start), order.shards_of(start, stop)[::-1])
        while len(self._waiting) > _WINDOWS_KEPT:
            self._waiting.popitem(last=False)
        # Only some at a time are taken on; the others are asked for again with the next sample.
        while waiting and self.stream.prefetch(waiting[-1]):
            waiting.pop()
