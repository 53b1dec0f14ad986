"""The endless queue of a source: one epoch after the other, dealt to lanes.

Sample X of the whole job goes to lane X mod lanes. So all lanes are equally far, and the first N samples that a job
takes are the N of the first epoch. What is left of a queue can be dealt to another number of lanes; no sample is lost
then, and none comes twice.

A *round* is what is dealt at once: round 0 is what was left of epochs that had been begun when the queue was made, and
each later round is one whole epoch. Each round is cut into one run per lane.

Decision: docs/decisions/0005-lanes-by-ranks.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from maskmatch_scale.data.order.epoch import Cut

ENDLESS = 1 << 62
"""Samples of an epoch of a source of which nobody knows how many it has. Its queue is never asked for a place."""


class SamplePlace(NamedTuple):
    """The place of a sample in the endless sequence of a source's epochs."""

    epoch: int
    lanes: int
    """Number of lanes that the order of this epoch was made for."""
    place: int
    """In the epoch; in a source without an index, a number that no other sample of the epoch has."""


class Interval(NamedTuple):
    """Consecutive places of one epoch: from ``start`` up to, but without, ``stop``."""

    epoch: int
    lanes: int
    """Number of lanes that the order of this epoch was made for."""
    start: int
    stop: int


@dataclass(frozen=True)
class Queue:
    """What is left of the endless sequence of a source's epochs, dealt to lanes.

    Attributes:
        samples: of an epoch.
        lanes: number of lanes that it is dealt to.
        left: what is left of epochs that were begun, in the order in which it comes. Whole epochs follow.
        epoch: the first whole one.
    """

    samples: int
    lanes: int
    left: tuple[Interval, ...] = ()
    epoch: int = 0

    def at(self, lane: int, count: int) -> SamplePlace:
        """What a lane takes next when it has taken ``count`` samples."""
        return self._place(*self._split(lane, count))

    def _split(self, lane: int, count: int) -> tuple[int, int, int]:
        """Where a lane is after ``count`` samples: the round, its run of the round, and the number within the run."""
        number = count * self.lanes + lane  # among the samples of all lanes
        rest = self._rest
        round_, begun_at = 0, 0
        if number >= rest:
            whole_epochs = (number - rest) // self.samples
            round_, begun_at = 1 + whole_epochs, rest + whole_epochs * self.samples
        # A round need not end with the last lane. The lane whose turn it is when a round begins has its first run.
        run = (lane - begun_at) % self.lanes
        return round_, run, (number - begun_at - run) // self.lanes

    @property
    def _rest(self) -> int:
        """Samples of round 0."""
        return self._ends[-1] if self.left else 0

    def _cut(self, round_: int) -> Cut:
        return Cut(self.samples if round_ else self._rest, self.lanes)

    def _place(self, round_: int, run: int, within: int) -> SamplePlace:
        """The place of sample number ``within`` of a run."""
        place = self._cut(round_).start(run) + within
        if round_:
            return SamplePlace(self.epoch + round_ - 1, self.lanes, place)
        ends = self._ends
        number = bisect_right(ends, place)
        interval = self.left[number]
        return SamplePlace(interval.epoch, interval.lanes, interval.stop - (ends[number] - place))

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Where each interval of round 0 ends if they are laid end to end."""
        # Added up once: after some changes of the mix there are thousands of intervals, and each sample asks.
        return tuple(accumulate(interval.stop - interval.start for interval in self.left))

    def after(self, counts: Sequence[int], lanes: int) -> Queue:
        """The queue that is left when lane i has taken ``counts[i]`` samples, dealt to another number of lanes."""
        if not any(counts):
            return Queue(self.samples, lanes, self.left, self.epoch)
        heads = [self._split(lane, count) for lane, count in enumerate(counts)]
        first, last = min(head[0] for head in heads), max(head[0] for head in heads)
        left: list[Interval] = []
        for round_ in range(first, last + 1):
            cut = self._cut(round_)
            begun_at = 0 if round_ == 0 else self._rest + (round_ - 1) * self.samples
            for run in range(self.lanes):
                at, _, within = heads[(run + begun_at) % self.lanes]
                start = cut.start(run) + (within if at == round_ else 0)
                if at <= round_ and start < cut.start(run + 1):
                    left.extend(self._intervals(round_, start, cut.start(run + 1)))
        return Queue(self.samples, lanes, tuple(_joined(left)), self.epoch + last)

    def _intervals(self, round_: int, start: int, stop: int) -> Iterator[Interval]:
        """Places [start, stop) of a round, as intervals of epochs."""
        if round_:
            yield Interval(self.epoch + round_ - 1, self.lanes, start, stop)
            return
        ends = self._ends
        for number in range(bisect_right(ends, start), len(ends)):
            interval, before = self.left[number], ends[number - 1] if number else 0
            low, high = max(start, before), min(stop, ends[number])
            if low >= high:
                return
            yield interval._replace(start=interval.start + low - before, stop=interval.start + high - before)


def _joined(intervals: Sequence[Interval]) -> Iterator[Interval]:
    """The same places in fewer intervals: where one begins at the end of the one before, both become one."""
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
