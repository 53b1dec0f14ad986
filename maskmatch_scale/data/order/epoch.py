"""Which sample comes when: the order of an epoch, and an endless queue of epochs shared out over lanes.

**The order of an epoch** is a pure function of (seed, source, epoch, samples a shard, window, lanes). Shards are
shuffled and laid end to end; this sequence is cut into as many runs as there are lanes, equal but for one sample; and
each run is shuffled in windows. A lane is what one rank reads by itself (by default there are as many as ranks), so
each shard is read by one rank, but for those that a cut goes through: at most lanes - 1 an epoch.

**A queue** deals epoch after epoch to its lanes: sample X of the whole job goes to lane X mod lanes, so that all lanes
are in the same place, and the first N samples that a job takes are the N of the first epoch. What is left of a queue
can be dealt anew to another number of lanes; nothing is lost and nothing comes twice.

Numbers come from Philox's raw bits, which numpy keeps the same over versions and machines (NEP 19), and from sorting.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.seeds import derive_seed


def permutation(seed: int, length: int) -> NDArray[np.int64]:
    """A permutation of range(length), the same on every machine: the order of ``length`` random 64-bit numbers."""
    return np.argsort(np.random.Philox(key=seed).random_raw(length), kind="stable")


@lru_cache(maxsize=512)
def _window(seed: int, length: int) -> NDArray[np.int32]:
    return permutation(seed, length).astype(np.int32)


@dataclass(frozen=True)
class Cut:
    """A sequence cut into runs, equal but for one element: the first ``length % runs`` are one longer."""

    length: int
    runs: int

    def start(self, run: int) -> int:
        """First place of run ``run``; with ``run == runs`` the end."""
        each, longer = divmod(self.length, self.runs)
        return run * each + min(run, longer)

    def run_of(self, place: int) -> int:
        """The run that ``place`` lies in."""
        each, longer = divmod(self.length, self.runs)
        edge = longer * (each + 1)
        return place // (each + 1) if place < edge else longer + (place - edge) // each


class EpochOrder:
    """Place in an epoch → (shard, sample within the shard).

    Args:
        sizes: int64 (shards,), samples a shard.
        seed: of this source and epoch.
        window: samples that are shuffled with each other.
        lanes: runs that the epoch is cut into.
    """

    def __init__(self, sizes: NDArray[np.int64], seed: int, window: int, lanes: int) -> None:
        self.seed = seed
        self.window = window
        self.shards = permutation(derive_seed(seed, "shards"), len(sizes))
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[self.shards])])
        self.cut = Cut(int(self.starts[-1]), lanes)

    def __len__(self) -> int:
        """Samples in the epoch."""
        return self.cut.length

    def __getitem__(self, place: int) -> tuple[int, int]:
        """(shard, sample within it) at ``place``, 0 ≤ place < len."""
        start, stop = self.window_of(place)
        within = _window(derive_seed(self.seed, "window", start), stop - start)
        at = start + int(within[place - start])
        number = int(np.searchsorted(self.starts, at, side="right")) - 1
        return int(self.shards[number]), at - int(self.starts[number])

    def window_of(self, place: int) -> tuple[int, int]:
        """First place of the window that ``place`` lies in, and its end."""
        run = self.cut.run_of(place)
        first, end = self.cut.start(run), self.cut.start(run + 1)
        start = first + (place - first) // self.window * self.window
        return start, min(start + self.window, end)

    def shards_of(self, start: int, stop: int) -> list[int]:
        """The shards that the window [start, stop) takes its samples from."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop - 1, side="right"))
        filled = self.starts[first + 1 : last + 1] > self.starts[first:last]  # of a draw, some shards have none
        return [int(shard) for shard in self.shards[first:last][filled]]

    def neighbouring_window(self, place: int) -> tuple[int, int]:
        """The window before that of ``place`` in its run, or else the one behind it, or else its own."""
        start, stop = self.window_of(place)
        run = self.cut.run_of(place)
        if start > self.cut.start(run):
            return self.window_of(start - 1)
        return self.window_of(stop) if stop < self.cut.start(run + 1) else (start, stop)


class Place(NamedTuple):
    """A sample's place in a source's endless sequence of epochs."""

    epoch: int
    lanes: int
    """That the order of this epoch was made for."""
    place: int


class Interval(NamedTuple):
    """Consecutive places of one epoch."""

    epoch: int
    lanes: int
    start: int
    stop: int


@dataclass(frozen=True)
class Queue:
    """What is left of a source's endless sequence of epochs, dealt to lanes.

    Attributes:
        samples: of an epoch.
        lanes: that it is dealt to.
        left: of epochs that were begun, in the order in which it comes; then whole epochs follow.
        epoch: the first whole one.
    """

    samples: int
    lanes: int
    left: tuple[Interval, ...] = ()
    epoch: int = 0

    def at(self, lane: int, count: int) -> Place:
        """What lane ``lane`` takes after it has taken ``count``."""
        return self._locate(*self._split(lane, count))

    def _split(self, lane: int, count: int) -> tuple[int, int, int]:
        """Round (0: what is left, 1: the first whole epoch, …), the lane's run in it, number within the run."""
        number = count * self.lanes + lane  # among the samples of all lanes
        rest = self._rest
        round_, begun = 0, 0
        if number >= rest:
            whole = (number - rest) // self.samples
            round_, begun = 1 + whole, rest + whole * self.samples
        # Whose turn it is goes round: the lane that is next when a round begins takes its first run.
        run = (lane - begun) % self.lanes
        return round_, run, (number - begun - run) // self.lanes

    @property
    def _rest(self) -> int:
        return sum(interval.stop - interval.start for interval in self.left)

    def _cut(self, round_: int) -> Cut:
        return Cut(self.samples if round_ else self._rest, self.lanes)

    def _locate(self, round_: int, run: int, within: int) -> Place:
        place = self._cut(round_).start(run) + within
        if round_:
            return Place(self.epoch + round_ - 1, self.lanes, place)
        ends = self._ends
        number = bisect_right(ends, place)
        interval = self.left[number]
        return Place(interval.epoch, interval.lanes, interval.stop - (ends[number] - place))

    @property
    def _ends(self) -> tuple[int, ...]:
        return _running_ends(self.left)

    def after(self, counts: Sequence[int], lanes: int) -> Queue:
        """The queue that is left when lane i has taken ``counts[i]``, dealt to another number of lanes."""
        if not any(counts):
            return Queue(self.samples, lanes, self.left, self.epoch)
        heads = [self._split(lane, count) for lane, count in enumerate(counts)]
        first, last = min(head[0] for head in heads), max(head[0] for head in heads)
        left: list[Interval] = []
        for round_ in range(first, last + 1):
            cut = self._cut(round_)
            begun = 0 if round_ == 0 else self._rest + (round_ - 1) * self.samples
            for run in range(self.lanes):
                at, _, within = heads[(run + begun) % self.lanes]
                start = cut.start(run) + (within if at == round_ else 0)
                if at <= round_ and start < cut.start(run + 1):
                    left.extend(self._intervals(round_, start, cut.start(run + 1)))
        return Queue(self.samples, lanes, tuple(_joined(left)), self.epoch + last)

    def _intervals(self, round_: int, start: int, stop: int) -> Iterator[Interval]:
        """Places [start, stop) of a round, as intervals of epochs."""
        if round_:
            yield Interval(self.epoch + round_ - 1, self.lanes, start, stop)
            return
        for interval, (before, end) in zip(self.left, pairwise((0, *self._ends))):
            low, high = max(start, before), min(stop, end)
            if low < high:
                yield interval._replace(start=interval.start + low - before, stop=interval.start + high - before)


@lru_cache(maxsize=64)
def _running_ends(left: tuple[Interval, ...]) -> tuple[int, ...]:
    return tuple(accumulate(interval.stop - interval.start for interval in left))


def _joined(intervals: Sequence[Interval]) -> Iterator[Interval]:
    """Neighbours that follow upon each other as one."""
    held: Interval | None = None
    for interval in intervals:
        if held is not None and held[:2] == interval[:2] and held.stop == interval.start:
            held = held._replace(stop=interval.stop)
            continue
        if held is not None:
            yield held
        held = interval
    if held is not None:
        yield held
