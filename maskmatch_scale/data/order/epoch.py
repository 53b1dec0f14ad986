"""The order of the samples in one epoch of a source.

It is a pure function of seed, source, epoch, samples per shard, window and number of lanes. A *lane* is the share of
the samples that one rank reads by itself; by default there are as many lanes as ranks. The order is made in three
steps:

1. The shards are shuffled and laid end to end.
2. This sequence is cut into one run per lane. Runs have equal lengths, but some are one sample longer.
3. Each run is cut into windows, and the samples of a window are shuffled with each other.

So each shard is read by one lane only, except those that a cut goes through: at most lanes - 1 per epoch.

Random numbers are the raw bits of Philox, which numpy keeps the same over versions and machines (NEP 19). A permutation
is the sorting order of such numbers.

Decision: docs/decisions/0001-random-access-to-shards.md.
Decision: docs/decisions/0005-lanes-by-ranks.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.node_arrays import LARGE, NodeArrays
from maskmatch_scale.seeds import derive_seed

_FILES_OF_A_SOURCE = 8
"""Epochs of a source whose sequences are kept on the disk: four of each of two runs."""
_VERSION = 1
"""Of the order: it is part of the names of files, so that no other order is taken for it."""


def permutation(seed: int, length: int) -> NDArray[np.int64]:
    """A permutation of range(length), the same on every machine: the order of ``length`` random 64-bit numbers."""
    return np.argsort(np.random.Philox(key=seed).random_raw(length), kind="stable")


@lru_cache(maxsize=512)
def _window_permutation(seed: int, length: int) -> NDArray[np.int32]:
    return permutation(seed, length).astype(np.int32)


@dataclass(frozen=True)
class Cut:
    """A sequence of ``length`` elements, cut into ``runs``. The first ``length % runs`` of them are one longer."""

    length: int
    runs: int

    def start(self, run: int) -> int:
        """First place of a run; for ``run == runs`` the length of the sequence."""
        each, longer = divmod(self.length, self.runs)
        return run * each + min(run, longer)

    def run_of(self, place: int) -> int:
        """The run that ``place`` belongs to."""
        each, longer = divmod(self.length, self.runs)
        edge = longer * (each + 1)
        return place // (each + 1) if place < edge else longer + (place - edge) // each


class ShardSequence(NamedTuple):
    """The shards of an epoch, laid end to end. Neither window nor lanes change it."""

    shards: NDArray[np.int64]
    """int64 (shards,): the shards in the order of the sequence."""
    starts: NDArray[np.int64]
    """int64 (shards + 1,): where each of them starts in the sequence, and the length of the sequence."""


def lay_out(sizes: NDArray[np.int64], seed: int) -> ShardSequence:
    """The sequence of an epoch.

    Args:
        sizes: int64 (shards,), samples per shard.
        seed: of this source and epoch.
    """
    shards = permutation(derive_seed(seed, "shards"), len(sizes))
    return ShardSequence(shards, np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[shards])]))


def lay_out_once(sizes: NDArray[np.int64], digest: str, seed: int, arrays: NodeArrays) -> ShardSequence:
    """As :func:`lay_out`; where there are many shards, one process of this node makes it and the others map it.

    Args:
        sizes: as there.
        digest: hex, of the sizes and of whose they are.
        seed: as there.
        arrays: what the processes of this node share.
    """
    if len(sizes) < LARGE:
        return lay_out(sizes, seed)
    kind = f"order{_VERSION}-{digest}"
    found = arrays.get(kind, f"{seed:016x}", lambda: lay_out(sizes, seed)._asdict(), most=_FILES_OF_A_SOURCE)
    return ShardSequence(found["shards"], found["starts"])


class EpochOrder:
    """The sample at each place of one epoch. Run n of the epoch belongs to lane n.

    Args:
        sizes: int64 (shards,), samples per shard.
        seed: of this source and epoch.
        window: samples that are shuffled with each other.
        lanes: number of runs that the epoch is cut into.
        sequence: what :func:`lay_out` returns for sizes and seed, if it is known.
    """

    def __init__(
        self, sizes: NDArray[np.int64], seed: int, window: int, lanes: int, sequence: ShardSequence | None = None
    ) -> None:
        self.seed = seed
        self.window = window
        self.shards, self.starts = sequence or lay_out(sizes, seed)
        self.cut = Cut(int(self.starts[-1]), lanes)

    def __len__(self) -> int:
        """Samples in the epoch."""
        return self.cut.length

    def __getitem__(self, place: int) -> tuple[int, int]:
        """(shard, number of the sample within it) at ``place``, 0 ≤ place < len."""
        start, stop = self.window_of(place)
        within = _window_permutation(derive_seed(self.seed, "window", start), stop - start)
        at = start + int(within[place - start])
        number = int(np.searchsorted(self.starts, at, side="right")) - 1
        return int(self.shards[number]), at - int(self.starts[number])

    def window_of(self, place: int) -> tuple[int, int]:
        """First place and end of the window that ``place`` belongs to."""
        run = self.cut.run_of(place)
        first, end = self.cut.start(run), self.cut.start(run + 1)
        start = first + (place - first) // self.window * self.window
        return start, min(start + self.window, end)

    def shards_of(self, start: int, stop: int) -> list[int]:
        """The shards that hold the samples of the window [start, stop)."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop - 1, side="right"))
        # Where only drawn samples are used, a shard may have none.
        filled = self.starts[first + 1 : last + 1] > self.starts[first:last]
        return [int(shard) for shard in self.shards[first:last][filled]]

    def neighbouring_window(self, place: int) -> tuple[int, int]:
        """The window before that of ``place`` in its run.

        For the first window that is the one after it, and for the only one itself.
        """
        start, stop = self.window_of(place)
        run = self.cut.run_of(place)
        if start > self.cut.start(run):
            return self.window_of(start - 1)
        return self.window_of(stop) if stop < self.cut.start(run + 1) else (start, stop)
