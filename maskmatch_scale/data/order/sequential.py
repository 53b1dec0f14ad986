"""A source of the mix whose shards have no index: they are read in sequence, by lanes.

Nobody knows how many samples it has. So the mix says only which source comes when, and the sample is the next one of a
lane. A lane belongs to one process, which gives it out in order.

Decision: docs/decisions/0066-sequential-sources.md.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.order.lane import FIRST_WINDOW, Cursor, Entry, Lane, LaneState, OutOfReachError, Windows
from maskmatch_scale.data.order.mix import SourceInfo
from maskmatch_scale.data.order.patience import Patience
from maskmatch_scale.data.order.queue import ENDLESS, SamplePlace
from maskmatch_scale.data.order.source import Skip
from maskmatch_scale.data.remote.shard_cache import Fetched
from maskmatch_scale.data.remote.stream import Readable, RemoteStream, open_stream
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.data.shards.metadata import MetadataFilter
from maskmatch_scale.data.shards.reading import RawSample
from maskmatch_scale.data.shards.sequence import Found, read_in_sequence
from maskmatch_scale.recipe.where import Where
from maskmatch_scale.redact import PIPE, shown
from maskmatch_scale.seeds import derive_seed

Prepared = TypeVar("Prepared")

_WINDOW_BYTES = 1 << 30
"""Of the encoded images of all windows that the lanes of a rank give out; as many are read ahead."""
_MOST_BAD = 1000
"""If so many samples of a lane in a row cannot be used, the source is given up."""
_MOST_BAD_SHARDS = 48
"""Likewise of shards of which nothing can be read."""
_LEFT_OUT_WITHOUT_A_FIELD = 1000
"""If `where` leaves out so many samples of a lane in a row, and no sample has had one of its fields, it is refused."""
_MOST_LEFT_OUT = 100_000
"""Likewise of any samples."""
_MOST_SHARDS_LEFT_OUT = 64
"""Likewise of all samples of so many shards, or of all shards of the source four times over, whichever is more."""
_KEPT = 16
"""Samples that a process keeps, encoded, for an outage."""
_SAMPLES_OF_A_SHARD = 1 << 32
"""Room for the number of a sample within its shard, in the number of its place."""


@dataclass(frozen=True)
class Deal:
    """How the shards of sequential sources are dealt."""

    lanes: int
    """Of all ranks."""
    per_rank: int
    """Lanes of a rank when the sources began. It decides how large the windows are, which then stay so."""
    first_window: int = FIRST_WINDOW
    """Samples of the first window of a lane, see :class:`Windows`."""


class SequentialSource:
    """The samples of shards without an index, without end, with a weight in the mix.

    Args:
        shards: paths or addresses.
        name: of the source; its order is drawn from name and seed.
        seed: of the run and side.
        window: samples of all windows that the lanes of a rank give out.
        options: how shards are fetched.
        deal: to how many lanes.
        weight: its share of the mix, relative to those of the other sources.
        skip: whether bad samples are skipped; otherwise they are errors.
        patience: how long may be waited for shards that do not come; shared by the sources of a run.
        where: which samples are used; None: all.
    """

    def __init__(
        self,
        shards: Sequence[str],
        name: str,
        seed: int,
        window: int,
        options: FetchOptions,
        deal: Deal,
        *,
        weight: float = 1.0,
        skip: bool = True,
        patience: Patience | None = None,
        where: Where | None = None,
    ) -> None:
        self.name, self.seed, self.skip = name, seed, skip
        self._weight, self._window, self._options = weight, window, options
        # One piece of memory, which forked processes share: counting references to a million strings would copy them.
        self._shards = np.array([shard.encode() for shard in shards])
        self._patience = patience or Patience()
        self._filter = None if where is None else MetadataFilter(where)
        self._list_digest = self._digest_of_list()
        self._figures = Fetched()
        self._kept: deque[Entry] = deque(maxlen=_KEPT)
        self.deal(deal)

    def __len__(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def deal(self, deal: Deal, states: Mapping[int, LaneState] | None = None) -> None:
        """Deal the shards to lanes.

        Args:
            deal: to how many.
            states: where each lane goes on; None: all begin with their first epoch.
        """
        self._deal = deal
        self.states = dict(states or {lane: LaneState() for lane in range(deal.lanes)})
        """Where each lane is: those of this rank as of the last batch that was taken (:meth:`took`)."""
        self._open: dict[int, Lane] = {}
        self._left_out = 0
        """Samples that these lanes had left out when the figures were taken last."""
        content = hashlib.blake2b(repr((self.seed, self._window, deal.lanes)).encode(), digest_size=8)
        content.update(self._list_digest)
        self.info = SourceInfo(self.name, self._weight, ENDLESS, content.hexdigest())

    def begin_epoch(self, epoch: int) -> None:
        """Let all lanes begin this epoch."""
        self.deal(self._deal, {lane: LaneState(Cursor(epoch)) for lane in range(self._deal.lanes)})

    def _digest_of_list(self) -> bytes:
        digest = hashlib.blake2b()
        for number in range(len(self)):
            location = self.location(number)
            # A signed address is another one every day.
            digest.update((location if location.startswith(PIPE) else shown(location)).encode() + b"\n")
        if self._filter is not None:
            digest.update(self._filter.where.canonical.encode())
        return digest.digest()

    def location(self, shard: int) -> str:
        """Path or address of a shard."""
        return bytes(self._shards[shard]).decode()

    def took(self, lane: int, state: LaneState) -> None:
        """Note where a lane is after a batch that was taken."""
        self.states[lane] = state

    def close(self) -> None:
        """Close the shards that this process reads. A lane that is asked again opens its shard again."""
        for lane in self._open.values():
            lane.close()

    def load(
        self, number: int, prepare: Callable[[RawSample], Prepared]
    ) -> tuple[Prepared, SamplePlace, list[Skip], LaneState]:
        """Prepare the next sample of a lane that can be used.

        Args:
            number: of the lane.
            prepare: decodes a sample; raises BadSample.

        Returns:
            What ``prepare`` returned; the place of the sample, which no other sample has; the samples that were skipped
            before it; and where the lane is after it. If the network is taken for lost and the lane has nothing more, a
            sample that this process gave before is given once more, the lane stays where it is, and the last of the
            skipped samples has the reason ``unreachable``: the run should stop.

        Raises:
            BadSample: a sample is bad, and this source skips none.
            DataError: too many samples in a row cannot be used, or nothing can be fetched, or `where` leaves out all.
        """
        lane = self._open.get(number) or self._lane(number)
        skipped: list[Skip] = []
        shards: set[tuple[int, int]] = set()
        while len(skipped) < _MOST_BAD and len(shards) < _MOST_BAD_SHARDS:
            try:
                entry = lane.take()
            except OutOfReachError as error:
                return (*self._given_again(prepare, error, skipped), lane.state)
            sample = entry.found.sample
            assert sample is not None
            try:
                if isinstance(sample, BadSample):
                    raise sample
                prepared = prepare(sample)
            except BadSample as bad:
                if not self.skip:
                    raise
                skipped.append(self._skip(entry.shard, entry.found.key, bad.reason, str(bad)))
                if entry.found.key is None:
                    shards.add(entry.at[:2])
                continue
            self._kept.append(entry)
            return prepared, self._place(entry), skipped, lane.state
        raise DataError(
            f"source {self.name!r}: {len(skipped)} samples in a row cannot be used; the last: {skipped[-1].message}"
        )

    def _given_again(
        self, prepare: Callable[[RawSample], Prepared], error: OutOfReachError, skipped: list[Skip]
    ) -> tuple[Prepared, SamplePlace, list[Skip]]:
        if not self._kept:
            raise DataError(f"source {self.name!r}: nothing of it is on this machine: {error}") from None
        self._kept.rotate(1)
        entry = self._kept[0]
        assert isinstance(entry.found.sample, RawSample)
        lost = self._skip(error.shard, None, "unreachable", str(error))
        return prepare(entry.found.sample), self._place(entry), [*skipped, lost]

    def _skip(self, shard: int, key: str | None, reason: str, message: str) -> Skip:
        return Skip(self.name, shown(self.location(shard)), key, reason, message)

    def _place(self, entry: Entry) -> SamplePlace:
        epoch, _, sample = entry.at
        return SamplePlace(epoch, self._deal.lanes, entry.shard * _SAMPLES_OF_A_SHARD + sample)

    def _lane(self, number: int) -> Lane:
        each = self._deal.per_rank
        lane = Lane(
            derive_seed(self.seed, "order", self.name),
            len(self),
            number,
            self._deal.lanes,
            Windows(-(-self._window // each), -(-_WINDOW_BYTES // each), self._deal.first_window),
            partial(self._read, number),
            self._patience,
            skip=self.skip,
            state=self.states[number],
        )
        self._open[number] = lane
        return lane

    def _read(self, lane: int, shard: int) -> Generator[Found, None, None]:
        """The samples of a shard that a lane reads, also the bad ones."""
        location = self.location(shard)
        stream = open_stream(location, self._options, patience_s=self._patience.for_a_shard_s)
        elsewhere = isinstance(stream, RemoteStream)
        counted = Fetched()
        try:
            for number, found in enumerate(read_in_sequence(stream, location, self._filter)):
                if elsewhere and not number:
                    self._patience.recover()
                counted = self._count(stream, counted)
                if found.sample is None:
                    self._check_filter(self._open[lane])
                yield found
            self._figures += Fetched(shards=int(elsewhere))
        finally:
            stream.close()
            self._count(stream, counted)

    def _count(self, stream: Readable, counted: Fetched) -> Fetched:
        """Add to the figures what has come since ``counted``; returns what has come now."""
        if not isinstance(stream, RemoteStream):
            return counted
        now = Fetched(0, stream.received, stream.seconds, stream.failed_tries)
        self._figures += Fetched(*(new - old for new, old in zip(astuple(now), astuple(counted), strict=True)))
        return now

    def _check_filter(self, lane: Lane) -> None:
        """Refuse a condition by which a lane would read on and on.

        Raises:
            DataError: says what the samples are like.
        """
        assert self._filter is not None
        count = lane.left_out_in_a_row
        if count >= _LEFT_OUT_WITHOUT_A_FIELD and self._filter.unseen and (fault := self._filter.fault()):
            raise DataError(f"source {self.name!r}: {fault}")
        shards = max(_MOST_SHARDS_LEFT_OUT, 4 * len(self))
        if count >= _MOST_LEFT_OUT or lane.shards_in_a_row >= shards:
            why = self._filter.fault() or (
                f"where {self._filter.where.text!r}: none of the last {count} samples is like that; choose another "
                "filter, or other shards"
            )
            raise DataError(f"source {self.name!r}: {why}")

    def take_figures(self) -> Fetched:
        """What was fetched in this process since the last call."""
        figures, self._figures = self._figures, Fetched()
        before, self._left_out = self._left_out, sum(lane.left_out for lane in self._open.values())
        return figures + Fetched(left_out=self._left_out - before)
