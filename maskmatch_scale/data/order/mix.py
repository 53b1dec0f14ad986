"""Several weighted sources as one endless stream, dealt out to lanes; and its state, from which it continues.

Every lane takes its samples by a schedule of its own: after m samples each source has had its share of them, to less
than one sample a source (two sources; with more of them their roundings add up). Lanes are shifted against each other,
so that a global batch holds every source, too. All of it is arithmetic on m: nothing is drawn, nothing is kept.

A *leg* is a stretch of a run over which nothing about the mix changes: sources, weights, lanes, images a batch. Within
one, the state is the number of the step. Where a run continues with another mix or another number of ranks, a
new leg begins with what the old one has left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.order.epoch import Interval, Place, Queue


def shares(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """Weights as exact shares of what the sources before have left: the last one's is 1."""
    exact = [Fraction(str(weight)) for weight in weights]
    return tuple(weight / sum(exact[number:]) for number, weight in enumerate(exact))


def pick(chances: Sequence[Fraction], lane: int, lanes: int, number: int) -> tuple[int, int]:
    """Source of a lane's sample ``number``, and how many of that source the lane has had before it."""
    for source, chance in enumerate(chances):
        had = _had(chance, lane, lanes, number)
        if _had(chance, lane, lanes, number + 1) > had:
            return source, had
        number -= had
    raise AssertionError("the last source takes all that the others leave")


def counts(chances: Sequence[Fraction], lane: int, lanes: int, number: int) -> list[int]:
    """How many of every source are among a lane's first ``number`` samples."""
    result = []
    for chance in chances:
        had = _had(chance, lane, lanes, number)
        result.append(had)
        number -= had
    return result


def _had(chance: Fraction, lane: int, lanes: int, number: int) -> int:
    # Bresenham's line, with a start in its first pixel that differs by lane.
    above, below = chance.numerator, chance.denominator
    return (number * above + lane * below // lanes) // below


@dataclass(frozen=True)
class Part:
    """What the mix knows of a source."""

    name: str
    weight: float
    samples: int
    """Of an epoch."""
    content: str
    """Digest of its shard list and of what else decides its order: window, drawn samples."""


@dataclass(frozen=True)
class Leg:
    """A stretch of a run with one mix.

    Attributes:
        start: step with which it begins.
        lanes: that samples are dealt to.
        batch: images of a step over all ranks and micro-batches, a multiple of ``lanes``.
        parts: the sources.
        queues: what each of them had left when the leg began.
    """

    start: int
    lanes: int
    batch: int
    parts: tuple[Part, ...]
    queues: tuple[Queue, ...]

    @classmethod
    def first(cls, start: int, lanes: int, batch: int, parts: Sequence[Part]) -> Leg:
        """The leg of a run that begins."""
        return cls(start, lanes, batch, tuple(parts), tuple(Queue(part.samples, lanes) for part in parts))

    def __post_init__(self) -> None:
        assert self.batch % self.lanes == 0
        object.__setattr__(self, "_chances", shares([part.weight for part in self.parts]))

    @property
    def chances(self) -> tuple[Fraction, ...]:
        """See :func:`shares`."""
        chances: tuple[Fraction, ...] = self._chances  # type: ignore[attr-defined]
        return chances

    @property
    def a_lane(self) -> int:
        """Images of a step and lane."""
        return self.batch // self.lanes

    def at(self, step: int, lane: int, number: int) -> tuple[int, Place]:
        """Source, and place in its epochs, of image ``number`` of a lane in step ``step`` ≥ start."""
        assert step >= self.start
        source, had = pick(self.chances, lane, self.lanes, (step - self.start) * self.a_lane + number)
        return source, self.queues[source].at(lane, had)

    def next(self, step: int, start: int, lanes: int, batch: int, parts: Sequence[Part]) -> Leg:
        """The leg that follows when this one ends before step ``step``; it begins with step ``start``.

        The same leg if nothing changed. Of samples that were not taken none is lost, but order and lanes differ. A
        source that was not there, or whose shards are others now, begins with a new epoch.
        """
        # A leg that has begun goes on as it is, unless its side is to rest again: then, or where it has not begun, it
        # begins when it should, and never with a step that is over.
        has_begun = step > self.start and step >= start
        begins = self.start if has_begun else max(start, step)
        if (lanes, batch, tuple(parts), begins) == (self.lanes, self.batch, self.parts, self.start):
            return self
        taken = max(0, step - self.start) * self.a_lane
        had = [counts(self.chances, lane, self.lanes, taken) for lane in range(self.lanes)]
        old = {part.name: number for number, part in enumerate(self.parts)}
        queues = []
        for part in parts:
            where = old.get(part.name)
            if where is None:
                queues.append(Queue(part.samples, lanes))
                continue
            queue = self.queues[where].after([of_lane[where] for of_lane in had], lanes)
            if self.parts[where].content != part.content:
                queue = Queue(part.samples, lanes, (), queue.epoch)
            queues.append(queue)
        return Leg(max(start, step), lanes, batch, tuple(parts), tuple(queues))

    def changed(self, parts: Sequence[Part]) -> list[str]:
        """Names of sources that have other shards, or another order, than this leg's."""
        now = {part.name: part.content for part in parts}
        return [part.name for part in self.parts if now.get(part.name, part.content) != part.content]

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads; a few hundred bytes and up to some 30 a lane."""
        return {
            "start": self.start,
            "lanes": self.lanes,
            "batch": self.batch,
            "sources": [
                {
                    "name": part.name,
                    "weight": part.weight,
                    "samples": part.samples,
                    "content": part.content,
                    "left": [list(interval) for interval in queue.left],
                    "epoch": queue.epoch,
                }
                for part, queue in zip(self.parts, self.queues, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Leg:
        """Read back.

        Raises:
            DataError: that is no state of a stream.
        """
        try:
            lanes = int(state["lanes"])
            parts = tuple(
                Part(str(s["name"]), float(s["weight"]), int(s["samples"]), str(s["content"])) for s in state["sources"]
            )
            queues = tuple(
                Queue(int(s["samples"]), lanes, tuple(Interval(*map(int, i)) for i in s["left"]), int(s["epoch"]))
                for s in state["sources"]
            )
            return cls(int(state["start"]), lanes, int(state["batch"]), parts, queues)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the checkpoint's stream state cannot be read ({error!r})") from None
