"""Batches made ahead by loader processes.

A process hands a batch over in shared memory. torch's loader takes fresh memory for each one, and the first touch of a
page can cost more than what is written to it. Here the memory is taken once: batch n goes to slot n mod slots, and what
the queue carries is its number. A slot is free again when its batch was copied out of it, which is before the loader is
asked for the next one.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskmatch_scale.data.batches.stream import Batch, TrainingStream
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.order.source import Skip

_AHEAD = 2
"""Batches that each process makes ahead."""


@dataclass(frozen=True)
class _Slot:
    """Shared memory for one batch, as large as the largest."""

    tensors: tuple[Tensor, ...]

    @classmethod
    def like(cls, batch: Batch) -> _Slot:
        places = tuple(torch.empty_like(tensor) for tensor in batch.tensors)
        for place in places:
            place.share_memory_()  # type: ignore[no-untyped-call]
        return cls(places)

    def put(self, batch: Batch) -> _Made:
        """Copy a batch's pixels here; returns the rest of it."""
        for place, tensor in zip(self.tensors, batch.tensors, strict=True):
            place[: len(tensor)].copy_(tensor)
        return _Made(tuple(map(len, batch.tensors)), batch.unlabelled_positions, batch.skipped)

    def take(self, made: _Made, *, pin_memory: bool) -> Batch:
        """A copy of the batch that lies here, page-locked if asked."""
        found = [place[:size] for place, size in zip(self.tensors, made.sizes, strict=True)]
        images, labels, views, valid = (part.pin_memory() if pin_memory else part.clone() for part in found)
        return Batch(images, labels, views, valid, made.positions, made.skipped)


@dataclass(frozen=True)
class _Made:
    """What the queue carries of a batch: no tensor, whose memory would be shared anew."""

    sizes: tuple[int, ...]
    positions: tuple[int, ...]
    skipped: tuple[Skip, ...]


class _Filling(Dataset["_Made | DataError"]):
    """Micro-batch number → its batch, in its slot."""

    def __init__(self, stream: TrainingStream, start: int, slots: list[_Slot]) -> None:
        self.stream, self.start, self.slots = stream, start, slots

    def __getitem__(self, number: int) -> _Made | DataError:
        try:
            batch = self.stream[number]
        except DataError as error:
            return error  # raised here it would arrive wrapped in its traceback
        return self.slots[(number - self.start) % len(self.slots)].put(batch)


def batches(stream: TrainingStream, start: int, stop: int, *, pin_memory: bool = False) -> Generator[Batch, None, None]:
    """Micro-batches ``start`` … ``stop`` - 1 in order, loaded ahead by ``data.workers`` processes.

    Raises:
        DataError: a sample that cannot be used, when its batch is due.
    """
    workers = min(stream.recipe.data.workers, stop - start)
    if workers <= 0:
        for number in range(start, stop):
            batch = stream[number]
            yield batch.with_tensors([t.pin_memory() for t in batch.tensors]) if pin_memory else batch
        return
    # One more than are under way: the next is begun when a batch is handed out, before it is copied.
    slots = [_Slot.like(stream.largest_batch()) for _ in range(workers * _AHEAD + 1)]
    loader = DataLoader(
        _Filling(stream, start, slots),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=_AHEAD,
    )
    for number, made in enumerate(loader):
        if isinstance(made, DataError):
            raise made
        yield slots[number % len(slots)].take(made, pin_memory=pin_memory)
