"""Batches that loader processes make ahead of time.

A process hands a batch over in shared memory. The loader of torch allocates new memory for each batch, and the first
access to each page of it can take longer than writing the batch. Here the memory is allocated once, in *slots* for one
batch each: batch n is made in slot n mod slots, and only the rest of the batch goes through the queue of the loader. A
slot may be used again when its batch was copied out of it, which is before the loader is asked for the next batch.

Decision: docs/decisions/0003-batches-in-reused-shared-memory.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.data.batches.processes import in_processes
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.order.lane import LaneState
from maskmatch_scale.data.order.source import Skip
from maskmatch_scale.data.remote.shard_cache import Fetched

_AHEAD = 2
"""Batches that each process makes ahead of time."""
_SHARED_MEMORY = "/dev/shm"
"""Where Linux keeps shared memory."""
_LOCKS_BYTES = 1 << 20
"""More than the locks of a loader's queues take there: a page each."""


@dataclass(frozen=True)
class _Slot:
    """Shared memory for one batch, large enough for the largest."""

    memory: Batch

    @classmethod
    def like(cls, batch: Batch) -> _Slot:
        """A slot for batches that are no larger than this one."""
        tensors = tuple(torch.empty_like(tensor) for tensor in batch.tensors)
        for tensor in tensors:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        return cls(batch.with_tensors(tensors))

    def fill(self, made: TrainingBatches, number: int) -> _Rest:
        """Make a batch in this slot; returns the rest of the batch."""
        batch = made.make(number, self.memory)
        return _Rest(tuple(map(len, batch.tensors)), batch.positions, batch.skipped, batch.fetched, batch.lanes)

    def take(self, rest: _Rest, *, pin_memory: bool) -> Batch:
        """A copy of the batch in this slot, in page-locked memory if asked."""
        found = [shared[:size] for shared, size in zip(self.memory.tensors, rest.sizes, strict=True)]
        images, labels, views, valid, draws = (part.pin_memory() if pin_memory else part.clone() for part in found)
        return Batch(images, labels, views, valid, draws, rest.positions, rest.skipped, rest.fetched, rest.lanes)


@dataclass(frozen=True)
class _Rest:
    """A batch without its tensors: for a tensor, the queue of the loader would allocate shared memory again."""

    sizes: tuple[int, ...]
    """Images in each tensor of the batch."""
    positions: tuple[int, ...]
    skipped: tuple[Skip, ...]
    fetched: Fetched
    lanes: tuple[tuple[str, int, LaneState], ...]


class _Filling(Dataset["_Rest | DataError"]):
    """Maps the number of a micro-batch to its rest; its tensors are made in their slot."""

    def __init__(self, made: TrainingBatches, start: int, slots: list[_Slot]) -> None:
        self.made, self.start, self.slots = made, start, slots

    def __getitem__(self, number: int) -> _Rest | DataError:
        slot = self.slots[(number - self.start) % len(self.slots)]
        try:
            return slot.fill(self.made, number)
        except DataError as error:
            return error  # returned, because torch would add a traceback to the message of one that is raised


def check_shared_memory(made: TrainingBatches, batches: int, ranks: int) -> None:
    """Refuse a run whose loader processes need more shared memory than this machine or container has.

    Containers often have little: docker gives 64 MB.

    Args:
        made: makes the batches of this rank.
        batches: how many there will be.
        ranks: on this machine; each needs as much as this one.

    Raises:
        DataError: says how much is needed, how much there is, and what to do.
    """
    _, slots = _workers_and_slots(made, batches)
    free = _free_shared_memory()
    if free is not None and _shared_memory_needed(made, slots, ranks) > free:
        raise DataError(_too_little_shared_memory(made, slots, ranks))


def _workers_and_slots(made: TrainingBatches, batches: int) -> tuple[int, int]:
    """Loader processes for so many batches, and the slots that they need."""
    workers = max(0, min(made.recipe.data.workers, batches))
    # One more than can be under way: torch asks for another batch when it hands one out, before that one is copied.
    return workers, workers * _AHEAD + 1 if workers else 0


def _shared_memory_needed(made: TrainingBatches, slots: int, ranks: int) -> int:
    """Bytes that so many slots of each rank take, in whole pages, and the locks of the loader's queues."""
    page = os.sysconf("SC_PAGE_SIZE")
    slot = sum(-(-tensor.nbytes // page) * page for tensor in made.largest_batch().tensors)
    return ranks * (slots * slot + _LOCKS_BYTES) if slots else 0


def _free_shared_memory() -> int | None:
    """Bytes; None if this system has no such folder."""
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _too_little_shared_memory(made: TrainingBatches, slots: int, ranks: int) -> str:
    needed, free = _shared_memory_needed(made, slots, ranks), _free_shared_memory() or 0
    return (
        f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, but the loader processes need {needed / 1e6:.0f} MB "
        f"(data.workers={made.recipe.data.workers}, {ranks} rank{'s' if ranks > 1 else ''} on this machine); give the "
        f"container more (docker run --shm-size={math.ceil(2 * needed / 2**30)}g, or --ipc=host), or set data.workers=0"
    )


def load_batches(
    made: TrainingBatches, start: int, stop: int, *, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """Micro-batches ``start`` … ``stop`` - 1 in order, made ahead of time by ``data.workers`` processes.

    Close the generator if not all batches were taken: this ends the processes, and closes what this one reads.

    Args:
        made: makes them.
        start: number of the first.
        stop: number after the last.
        pin_memory: whether tensors are in page-locked memory.

    Raises:
        DataError: when it is the turn of a batch with a sample that cannot be used; see
            :meth:`TrainingBatches.__getitem__`.
    """
    workers, slots_needed = _workers_and_slots(made, stop - start)
    if workers <= 0:
        with closing(made):
            for number in range(start, stop):
                batch = made[number]
                made.took(batch)
                yield batch.with_tensors([t.pin_memory() for t in batch.tensors]) if pin_memory else batch
        return
    try:
        slots = [_Slot.like(made.largest_batch()) for _ in range(slots_needed)]
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise DataError(_too_little_shared_memory(made, slots_needed, 1)) from None
    with closing(in_processes(_Filling(made, start, slots), range(start, stop), workers, _AHEAD)) as found:
        for number, rest in enumerate(found):
            if isinstance(rest, DataError):
                raise rest
            batch = slots[number % len(slots)].take(rest, pin_memory=pin_memory)
            made.took(batch)
            yield batch
