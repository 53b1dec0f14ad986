"""Lanes of the sources without an index: how many there are, whose they are, and where they go on.

Micro-batch n of a rank takes its samples of these sources from lane n mod K of the rank's K lanes. Each of W loader
processes makes every W-th micro-batch. So if W divides K, a lane belongs to one process, and which sample comes when
depends on K alone.

Decision: docs/decisions/0066-sequential-sources.md.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from maskmatch_scale.data.batches.sources import Side
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.order.lane import LaneState
from maskmatch_scale.data.order.mix import Leg, counts
from maskmatch_scale.data.order.sequential import Deal, SequentialSource
from maskmatch_scale.recipe import Recipe

_WHOLE_WINDOW = 1 << 40
"""First window of runs whose checkpoints say nothing of it: all windows had the size of the recipe then."""
_TURNS_LOOKED_AT = 64
"""For so many turns a lane, on average, it is looked at whether each lane has one."""


def deal_lanes(recipe: Recipe, world_size: int, before: Mapping[str, Any] | None = None) -> Deal:
    """The number of lanes: `data.sequential_lanes`, or that of the run before, or one a loader process.

    Args:
        recipe: section data is read.
        world_size: number of ranks.
        before: what :func:`state_of` gave in the run that this one continues; None: it is a new one.

    Raises:
        DataError: ranks and loader processes do not divide them.
    """
    data, processes = recipe.data, max(1, recipe.data.workers)
    least = world_size * processes
    lanes = data.sequential_lanes or (int(before["lanes"]) if before else least)
    if lanes % least:
        whose = f"data.sequential_lanes={lanes}" if data.sequential_lanes else f"the {lanes} lanes that the run has had"
        raise DataError(
            f"{whose}: {world_size} ranks × {processes} loader processes (data.workers) do not divide them, and a lane "
            f"is read by one process; choose another data.workers, or set data.sequential_lanes to a multiple of "
            f"{least}" + ("" if data.sequential_lanes else ": then these sources begin a new epoch")
        )
    if before and int(before["lanes"]) == lanes:
        return Deal(lanes, int(before["per_rank"]), int(before.get("first_window", _WHOLE_WINDOW)))
    return Deal(lanes, lanes // world_size)


def state_of(deal: Deal) -> dict[str, int]:
    """What a checkpoint says of the lanes, the same on every rank."""
    return {"lanes": deal.lanes, "per_rank": deal.per_rank, "first_window": deal.first_window}


def check_shards(sources: Iterable[SequentialSource], deal: Deal) -> None:
    """Refuse sources with fewer shards than lanes.

    Raises:
        DataError: names the source.
    """
    for source in sources:
        if len(source) < deal.lanes:
            raise DataError(
                f"source {source.name!r}: {len(source)} shards for {deal.lanes} lanes (data.sequential_lanes; null = "
                "ranks × data.workers), each of which needs one; lower data.workers, or write more and smaller shards"
            )


def continue_lanes(
    source: SequentialSource, deal: Deal, content: str | None, ranks: Sequence[Mapping[str, Any] | None]
) -> None:
    """Let the lanes of a source go on where a run has stopped, also on other ranks.

    Args:
        source: of which the shards are dealt anew.
        deal: to how many lanes.
        content: what the checkpoint has as `SourceInfo.content` of a source of this name; None: it has none.
        ranks: what each rank has added to the state, see :meth:`TrainingBatches.own_state`.

    Raises:
        DataError: the state cannot be read.
    """
    source.deal(deal)
    try:
        states = {
            int(lane): LaneState.from_json(state)
            for rank in ranks
            if rank is not None
            for lane, state in rank["lanes"].get(source.name, {}).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the checkpoint's stream state cannot be read ({error!r})") from None
    if not states:
        return
    if content != source.info.content:
        source.begin_epoch(max(state.start.epoch for state in states.values()) + 1)
        return
    if states.keys() != set(range(deal.lanes)):
        raise DataError(f"the checkpoint's stream state has no place for some lanes of source {source.name!r}")
    source.deal(deal, states)


def check_turns(side: Side, deal: Deal, world_size: int, accumulation: int) -> None:
    """Refuse a mix in which some lane of some rank never has a turn, so that its shards would never be read.

    That happens where a source has its turns in a rhythm that fits the lanes, or the ranks. Every rank looks at all
    ranks, so that all of them refuse it.

    Args:
        side: with its mix.
        deal: of its sources without an index.
        world_size: number of ranks.
        accumulation: micro-batches in a step.

    Raises:
        DataError: names the source.
    """
    leg, each = side.leg, deal.lanes // world_size
    in_a_batch = leg.per_lane // accumulation  # images of a lane of the mix
    for number, source in enumerate(side.sources):
        if not isinstance(source, SequentialSource):
            continue
        waiting = set(range(deal.lanes))
        turns = [_turns(leg, lane, number) for lane in range(leg.lanes)]
        for _ in range(-(-_TURNS_LOOKED_AT * deal.lanes // leg.lanes)):
            for lane, own in enumerate(turns):
                micro, slot = divmod(next(own), in_a_batch)
                rank = (lane * in_a_batch + slot) // side.per_rank
                waiting.discard(rank * each + (leg.start * accumulation + micro) % each)
            if not waiting:
                break
        if waiting:
            rank = min(waiting) // each
            without = sum(lane // each == rank for lane in waiting)
            raise DataError(
                f"source {source.name!r}: with its weight and {side.per_rank} unlabelled images a micro-batch, "
                f"{without} of the {each} lanes (data.sequential_lanes) of rank {rank} would never be read; choose "
                "another number of lanes and loader processes (data.workers), another weight, or another data.lanes"
            )


def _turns(leg: Leg, lane: int, source: int) -> Iterator[int]:
    """Which of the images of a lane of the mix are from this source, without end."""

    def had(images: int) -> int:
        return counts(leg.chances, lane, leg.lanes, images)[source]

    images, farthest = 0, 1
    for turn in itertools.count(1):
        while had(farthest) < turn:
            images, farthest = farthest, 2 * farthest - images + 1
        images = bisect_left(range(farthest), turn, lo=images, key=had)
        yield images - 1
        farthest = images + 1
