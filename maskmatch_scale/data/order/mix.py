"""Several weighted sources mixed exactly and for ever, dealt to lanes; and the state from which a run continues.

Every lane takes its samples by a schedule of its own. After any number of samples, the samples that a lane has had of a
source differ from the source's exact share by less than one. That holds for two sources; with more of them, rounding
errors add up. The schedules of the lanes are shifted against each other, so that a global batch also holds every
source. All of it is computed from the number of the sample: nothing is drawn, and nothing is stored.

A *leg* is a stretch of a run in which nothing about the mix changes: not the sources, their weights, the lanes, or the
images per step. Within a leg, the number of the step is the whole state. Where a run continues with another mix or
another number of ranks, a new leg begins with what the old one has left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.order.queue import ENDLESS, Interval, Queue, SamplePlace


def shares(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """For each source its share of the samples that the sources before it leave, exact. That of the last one is 1.

    Args:
        weights: > 0, of any scale.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    return tuple(weight / sum(exact[number:]) for number, weight in enumerate(exact))


def pick(chances: Sequence[Fraction], lane: int, lanes: int, number: int) -> tuple[int, int]:
    """The source that sample ``number`` of a lane is from, and how many of that source the lane has had before.

    Args:
        chances: as :func:`shares` returns them.
        lane: of ``lanes``.
        lanes: how many there are.
        number: ≥ 0.
    """
    for source, chance in enumerate(chances):
        had = _had(chance, lane, lanes, number)
        if _had(chance, lane, lanes, number + 1) > had:
            return source, had
        number -= had
    raise AssertionError("the last source takes all that the others leave")


def counts(chances: Sequence[Fraction], lane: int, lanes: int, number: int) -> list[int]:
    """How many samples of each source are among the first ``number`` of a lane; arguments as in :func:`pick`."""
    result = []
    for chance in chances:
        had = _had(chance, lane, lanes, number)
        result.append(had)
        number -= had
    return result


def _had(chance: Fraction, lane: int, lanes: int, number: int) -> int:
    # Height at ``number`` of Bresenham's line of slope ``chance``. Its start within the first step depends on the lane.
    above, below = chance.numerator, chance.denominator
    return (number * above + lane * below // lanes) // below


@dataclass(frozen=True)
class SourceInfo:
    """The facts about a source that the mix depends on."""

    name: str
    weight: float
    samples: int
    """Of an epoch; `ENDLESS` if nobody knows."""
    content: str
    """Digest of its list of shards and of what else decides its order: seed, window, drawn samples."""


@dataclass(frozen=True)
class Leg:
    """A stretch of a run with one mix.

    Attributes:
        start: the step that it begins with.
        lanes: number of lanes that samples are dealt to.
        batch: images of a step over all ranks and micro-batches, a multiple of ``lanes``.
        sources: what is mixed.
        queues: what each of the sources had left when the leg began.
    """

    start: int
    lanes: int
    batch: int
    sources: tuple[SourceInfo, ...]
    queues: tuple[Queue, ...]

    @classmethod
    def first(cls, start: int, lanes: int, batch: int, sources: Sequence[SourceInfo]) -> Leg:
        """The first leg of a run."""
        return cls(start, lanes, batch, tuple(sources), tuple(Queue(source.samples, lanes) for source in sources))

    def __post_init__(self) -> None:
        assert self.batch % self.lanes == 0
        object.__setattr__(self, "_chances", shares([source.weight for source in self.sources]))

    @property
    def chances(self) -> tuple[Fraction, ...]:
        """See :func:`shares`."""
        chances: tuple[Fraction, ...] = self._chances  # type: ignore[attr-defined]
        return chances

    @property
    def per_lane(self) -> int:
        """Images of one lane in a step."""
        return self.batch // self.lanes

    def at(self, step: int, lane: int, number: int) -> tuple[int, SamplePlace]:
        """The source of image ``number`` of a lane in a step, and the image's place in the epochs of that source.

        Args:
            step: ≥ ``start``.
            lane: 0 ≤ lane < ``lanes``.
            number: 0 ≤ number < ``per_lane``.
        """
        assert step >= self.start
        source, had = pick(self.chances, lane, self.lanes, (step - self.start) * self.per_lane + number)
        return source, self.queues[source].at(lane, had)

    def next(self, step: int, start: int, lanes: int, batch: int, sources: Sequence[SourceInfo]) -> Leg:
        """The leg that follows when this one ends before step ``step``; this leg itself if nothing changes.

        No sample is lost that was not taken, but order and lanes differ. A source that was not there before, or that
        has other shards now, begins a new epoch.

        Args:
            step: the first step that this leg does not make.
            start: the first step in which the recipe wants samples of this mix.
            lanes: as in :class:`Leg`.
            batch: as in :class:`Leg`.
            sources: as in :class:`Leg`.
        """
        # A leg that has begun keeps its start, unless the recipe now wants no samples yet. Any other leg begins with
        # the step that the recipe wants, but never with one that is over.
        has_begun = step > self.start and step >= start
        begins = self.start if has_begun else max(start, step)
        if (lanes, batch, tuple(sources), begins) == (self.lanes, self.batch, self.sources, self.start):
            return self
        taken = max(0, step - self.start) * self.per_lane
        had = [counts(self.chances, lane, self.lanes, taken) for lane in range(self.lanes)]
        old = {source.name: number for number, source in enumerate(self.sources)}
        queues = []
        for source in sources:
            where = old.get(source.name)
            if where is None or source.samples == ENDLESS:
                queues.append(Queue(source.samples, lanes))
                continue
            queue = self.queues[where].after([of_lane[where] for of_lane in had], lanes)
            if self.sources[where].content != source.content:
                queue = Queue(source.samples, lanes, (), queue.epoch)
            queues.append(queue)
        return Leg(max(start, step), lanes, batch, tuple(sources), tuple(queues))

    def changed(self, sources: Sequence[SourceInfo]) -> list[str]:
        """Names of the sources that have other shards, or another order, than they have in this leg."""
        now = {source.name: source.content for source in sources}
        return [source.name for source in self.sources if now.get(source.name, source.content) != source.content]

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads: a few hundred bytes, and after a change of the mix up to about 30 per lane."""
        return {
            "start": self.start,
            "lanes": self.lanes,
            "batch": self.batch,
            "sources": [
                {
                    "name": source.name,
                    "weight": source.weight,
                    "samples": source.samples,
                    "content": source.content,
                    "left": [list(interval) for interval in queue.left],
                    "epoch": queue.epoch,
                }
                for source, queue in zip(self.sources, self.queues, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Leg:
        """Read what :meth:`as_json` returned.

        Raises:
            DataError: the state is not that of a leg.
        """
        try:
            lanes = int(state["lanes"])
            sources = tuple(
                SourceInfo(str(s["name"]), float(s["weight"]), int(s["samples"]), str(s["content"]))
                for s in state["sources"]
            )
            queues = tuple(
                Queue(int(s["samples"]), lanes, tuple(Interval(*map(int, i)) for i in s["left"]), int(s["epoch"]))
                for s in state["sources"]
            )
            return cls(int(state["start"]), lanes, int(state["batch"]), sources, queues)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the checkpoint's stream state cannot be read ({error!r})") from None
