"""Lanes of the sources without an index: how many there are, whose they are, and where they go on.

Micro-batch n of a rank takes its samples of these sources from lane n mod K of the rank's K lanes. Each of W loader
processes makes every W-th micro-batch. So if W divides K, a lane belongs to one process, and which sample comes when
depends on K alone.

Decision: docs/decisions/0066-sequential-sources.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from maskmatch_scale.data.batches.sources import Side
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.order.lane import LaneState
from maskmatch_scale.data.order.sequential import Deal, SequentialSource
from maskmatch_scale.recipe import Recipe

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
        return Deal(lanes, int(before["per_rank"]))
    return Deal(lanes, lanes // world_size)


def state_of(deal: Deal) -> dict[str, int]:
    """What a checkpoint says of the lanes, the same on every rank."""
    return {"lanes": deal.lanes, "per_rank": deal.per_rank}


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


def check_turns(side: Side, lanes: int, slots: Callable[[int], Iterable[tuple[int, int]]], accumulation: int) -> None:
    """Refuse a mix in which some lane of this rank never has a turn, so that its shards would never be read.

    That happens where a source has less than one sample in a batch, in a rhythm that fits the lanes.

    Args:
        side: with its mix.
        lanes: of a rank.
        slots: see :meth:`TrainingBatches._slots`, of the side.
        accumulation: micro-batches in a step.

    Raises:
        DataError: names the source.
    """
    total = sum(source.info.weight for source in side.sources)
    for number, source in enumerate(side.sources):
        in_a_batch = side.per_rank * source.info.weight / total
        if not isinstance(source, SequentialSource) or lanes == 1 or in_a_batch >= 1:
            continue
        first = side.leg.start * accumulation
        waiting = set(range(lanes))
        for batch in range(first, first + int(_TURNS_LOOKED_AT * lanes / in_a_batch)):
            if any(side.leg.at(batch // accumulation, *slot)[0] == number for slot in slots(batch)):
                waiting.discard(batch % lanes)
                if not waiting:
                    break
        if waiting:
            raise DataError(
                f"source {source.name!r}: with its weight and {side.per_rank} unlabelled images a micro-batch, "
                f"{len(waiting)} of a rank's {lanes} lanes (data.sequential_lanes) would never be read; choose another "
                "number of lanes and loader processes (data.workers), or another weight"
            )
