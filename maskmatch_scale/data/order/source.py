"""One source of the mix: the order of its samples, and which sample replaces one that cannot be used.

Decision: docs/decisions/0030-a-stream-is-a-list-of-shards.md.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import BadSample, DataError, NotFetched
from maskmatch_scale.data.order.epoch import EpochOrder, lay_out_once
from maskmatch_scale.data.order.mix import SourceInfo
from maskmatch_scale.data.order.patience import Patience
from maskmatch_scale.data.order.queue import SamplePlace
from maskmatch_scale.data.remote.shard_cache import Fetched
from maskmatch_scale.data.shards.reading import RawSample, ShardStream
from maskmatch_scale.redact import is_remote, shown
from maskmatch_scale.seeds import derive_seed

Prepared = TypeVar("Prepared")

_REPLACEMENTS_PER_RANGE = 16
"""At most so many replacements of a bad sample are drawn from its window, then as many from a neighbouring one, then as
many from its whole epoch."""

_ORDERS_KEPT = 4
"""Epochs whose order is kept, in memory or mapped. All lanes are in the same epoch or in neighbouring ones."""

_WINDOWS_KEPT = 1024
"""For so many windows it is remembered which of their shards have not been asked for yet."""


@dataclass(frozen=True)
class Skip:
    """A sample that could not be used and was skipped."""

    source: str
    shard: str
    key: str | None
    """None if the shard cannot be read far enough to know it."""
    reason: str
    """One of :data:`~maskmatch_scale.data.faults.REASONS`."""
    message: str


class WeightedSource:
    """The samples of one stream of shards, without end, with a weight in the mix.

    The order of an epoch depends on seed, name, epoch, shards, window and lanes alone.

    Args:
        stream: its shards.
        name: of the source; its order is drawn from name and seed.
        seed: of the run and side.
        window: samples that are shuffled with each other.
        weight: its share of the mix, relative to those of the other sources.
        skip: whether bad samples are skipped; otherwise they are errors.
        numbers: int64, ascending: the samples of the stream that are used; None = all.
        patience: how long may be waited for shards that do not come; shared by the sources of a run.
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
        patience: Patience | None = None,
    ) -> None:
        self.stream = stream
        self.name = name
        self.seed = seed
        self.window = window
        self.skip = skip
        self.numbers = numbers
        self.sizes = stream.shards.samples
        """int64 (shards,): used samples per shard."""
        self._first = stream.shards.starts
        if numbers is not None:
            self._first = np.searchsorted(numbers, stream.shards.starts)
            self.sizes = np.diff(self._first)
        self.info = SourceInfo(name, weight, int(self.sizes.sum()), self._digest())
        self.is_remote = is_remote(stream.root) or stream.shards.has_addresses
        """Whether its shards have to be fetched."""
        self._patience = patience or Patience()
        self._arrivals = 0
        self._here: tuple[int, list[int]] | None = None
        self._orders: OrderedDict[tuple[int, int], EpochOrder] = OrderedDict()
        self._not_asked_for: OrderedDict[tuple[int, int], list[int]] = OrderedDict()

    def _digest(self) -> str:
        digest = hashlib.blake2b(repr((self.seed, self.window)).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.sizes, dtype="<i8").data)
        digest.update(self.stream.identities().data)
        if self.numbers is not None:
            digest.update(np.ascontiguousarray(self.numbers, dtype="<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def _sizes_digest(self) -> str:
        """Of sizes and name: sources of equal sizes must not push each other's orders from the disk."""
        digest = hashlib.sha256(np.ascontiguousarray(self.sizes, dtype="<i8").data)
        digest.update(self.name.encode())
        return digest.hexdigest()[:32]

    def order(self, epoch: int, lanes: int) -> EpochOrder:
        """The order of an epoch that is dealt to this number of lanes."""
        order = self._orders.get((epoch, lanes))
        if order is None:
            while len(self._orders) >= _ORDERS_KEPT:
                self._orders.popitem(last=False)
            seed = derive_seed(self.seed, "order", self.name, epoch)
            arrays = self.stream.arrays
            sequence = None if arrays is None else lay_out_once(self.sizes, self._sizes_digest, seed, arrays)
            order = EpochOrder(self.sizes, seed, self.window, lanes, sequence)
            self._orders[epoch, lanes] = order
        return order

    def locate(self, place: SamplePlace) -> tuple[int, int]:
        """(shard, number within it) of the sample at ``place``."""
        return self._in_shard(*self.order(place.epoch, place.lanes)[place.place])

    def _in_shard(self, shard: int, among_used: int) -> tuple[int, int]:
        """(shard, number within it) of a used sample, from its number among the used ones of the shard."""
        if self.numbers is None:
            return shard, among_used
        number = int(self.numbers[int(self._first[shard]) + among_used])
        return shard, number - int(self.stream.shards.starts[shard])

    def load(self, place: SamplePlace, prepare: Callable[[RawSample], Prepared]) -> tuple[Prepared, list[Skip]]:
        """Read the sample at ``place`` and prepare it; if it is bad and may be skipped, prepare another one instead.

        Args:
            place: in the epochs of this source.
            prepare: decodes a sample; raises BadSample.

        Returns:
            What ``prepare`` returned; and the sample at ``place`` if it was skipped. It is listed once, even if
            replacements were bad too. Its reason is ``unreachable`` if the network is taken for lost and a sample of
            some shard on this machine took its place, which ``place`` does not determine: the run should stop.

        Raises:
            BadSample: the sample is bad, and this source skips none.
            DataError: neither the sample nor any replacement can be used.
        """
        skipped: list[Skip] = []
        tried, last, not_fetched = 0, "", False
        for shard, within in self._candidates(place):
            tried += 1
            began = time.monotonic()
            try:
                prepared = self.stream.load(shard, within, prepare, patience_s=self._patience.for_a_shard_s)
                if self._arrivals != (arrivals := self.stream.arrivals):
                    self._arrivals = arrivals
                    self._patience.recover()
                return prepared, skipped
            except BadSample as bad:
                reason, last = bad.reason, str(bad)
                if isinstance(bad, NotFetched):
                    not_fetched = True
                    self._patience.waited(time.monotonic() - began)
                if not self.skip and not (isinstance(bad, NotFetched) and bad.may_pass):
                    raise
            if not skipped:
                key = self.stream.key(shard, within)
                skipped.append(Skip(self.name, shown(self.stream.shards.file(shard)), key, reason, last))
            if not_fetched and (self._patience.is_lost or not self.skip):
                break
        if not_fetched and (found := self._on_this_machine(place, prepare)) is not None:
            self._patience.give_up()
            return found[0], [replace(skipped[0], reason="unreachable", message=last)]
        raise DataError(f"source {self.name!r}: {tried} samples in a row cannot be used; the last: {last}")

    def _on_this_machine(self, place: SamplePlace, prepare: Callable[[RawSample], Prepared]) -> tuple[Prepared] | None:
        """Prepare any sample that can be read without fetching a shard; None if there is none.

        Training goes on with it until all ranks have heard that the network is lost and write a checkpoint.
        """
        arrivals = self.stream.arrivals
        if self._here is None or self._here[0] != arrivals:
            self._here = arrivals, [shard for shard in self.stream.shards_here() if self.sizes[shard]]
        _, here = self._here
        for attempt in range(_REPLACEMENTS_PER_RANGE if here else 0):
            drawn = derive_seed(self.seed, "on this machine", place.epoch, place.place, attempt)
            shard = here[drawn % len(here)]
            _, within = self._in_shard(shard, drawn // len(here) % int(self.sizes[shard]))
            with suppress(BadSample):
                return (self.stream.load(shard, within, prepare, patience_s=0.0),)
        return None

    def _candidates(self, place: SamplePlace) -> Iterator[tuple[int, int]]:
        """(shard, number within it) of the sample at a place, then of its replacements. They depend on the place alone.

        Replacements are drawn first from the window of the sample; then, in case one lost shard fills that window, from
        the window before or after it in the run, whose shards a lane has just read or is about to read; and last from
        the whole epoch.

        Decision: docs/decisions/0004-replacement-from-nearby.md.
        """
        yield self.locate(place)
        order = self.order(place.epoch, place.lanes)
        tried = {place.place}
        for start, stop in (order.window_of(place.place), order.neighbouring_window(place.place), (0, len(order))):
            for attempt in range(_REPLACEMENTS_PER_RANGE):
                drawn = start + derive_seed(order.seed, "stands in", place.place, start, attempt) % (stop - start)
                if drawn not in tried:
                    tried.add(drawn)
                    yield self._in_shard(*order[drawn])

    def take_figures(self) -> Fetched:
        """What was fetched in this process since the last call."""
        return self.stream.take_figures()

    def prefetch(self, place: SamplePlace) -> None:
        """Fetch the shards of the window around ``place`` in the background."""
        order = self.order(place.epoch, place.lanes)
        start, stop = order.window_of(place.place)
        shards = self._not_asked_for.setdefault((place.epoch, start), order.shards_of(start, stop)[::-1])
        while len(self._not_asked_for) > _WINDOWS_KEPT:
            self._not_asked_for.popitem(last=False)
        # Few prefetches are allowed at once. The other shards are asked for when the next sample of the window is read.
        while shards and self.stream.prefetch(shards[-1]):
            shards.pop()
