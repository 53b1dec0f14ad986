"""Checking a shard folder against its index, down to every pixel of a label map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.bands import choose_channels
from maskmatch_scale.data.images.opening import MAX_PIXELS
from maskmatch_scale.data.pool import results, usable_cores
from maskmatch_scale.data.shards.folder import ShardOpener, load_index
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardIndex, StreamEntry
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.data.tools.shard_check import Fault, OpenShard, ShardCheck, ShardToCheck
from maskmatch_scale.progress import progress_of

_SMALL_BYTES = 100_000_000
"""Folders up to this size are checked in this process: starting others takes longer."""


def verify(
    root: str | Path,
    *,
    deep: bool = True,
    progress: bool = False,
    workers: int | None = None,
    index: ShardIndex | None = None,
    open_shard: OpenShard | None = None,
    max_pixels: int = MAX_PIXELS,
    labels: dict[str, NDArray[np.int64]] | None = None,
) -> Iterator[Fault]:
    """Check every shard: presence, size, checksum, number of samples, headers, keys, and whether samples decode; and
    whether label maps have as many pixels of each class as the index says.

    Args:
        root: the shard folder.
        deep: whether to decode every image and label map, and look for label values that are no class.
        progress: whether to show a bar on stderr, if that is a terminal.
        workers: processes; None takes one a core for more than 100 MB. Several are started by `spawn`, so a script
            that calls this needs an `if __name__ == "__main__":` guard.
        index: of the folder; None reads ``root/index.json``.
        open_shard: how to open a shard, picklable if there are workers; None opens ``root/file``.
        max_pixels: larger images are faults.
        labels: if ``deep``, each labelled stream is entered when it is done: int64 (2, classes + 1), pixels of each
            class in the label maps that could be decoded, and samples that have some; last those that are ignored.

    Returns:
        The faults as they are found, in the order of the index. Keys that two shards of a stream share, and other
        pixels than the index says, come last in that stream.

    Raises:
        DataError: no index, or one that does not parse; a process was killed.
    """
    index = index or load_index(str(root), key="", parts=True)
    open_shard = open_shard or ShardOpener(str(root))
    check = ShardCheck(
        len(index.classes), index.ignore_index, deep, max_pixels, open_shard, choose_channels(index.bands)
    )
    shards = sum(len(stream.shards) for stream in index.streams.values())
    if workers is None:
        sizes = np.concatenate([stream.shards.bytes for stream in index.streams.values()] or [np.zeros(0, np.int64)])
        small = bool(sizes.all()) and int(sizes.sum()) <= _SMALL_BYTES
        workers = 1 if small else usable_cores()
    return _faults(index, check, min(workers, shards), progress, {} if labels is None else labels)


def _faults(
    index: ShardIndex, check: ShardCheck, workers: int, progress: bool, labels: dict[str, NDArray[np.int64]]
) -> Iterator[Fault]:
    shards = (
        ShardToCheck(name, stream.labelled, entry) for name, stream in index.streams.items() for entry in stream.shards
    )
    total = sum(stream.samples for stream in index.streams.values())
    killed = "a checking process was killed (out of memory?); try again with fewer workers"
    with (
        progress_of("", total, unit="samples", wanted=progress, elsewhere="nothing") as advance,
        results(check, shards, workers, if_killed=killed) as checked,
    ):
        for name, stream in index.streams.items():
            hashes = []
            total_of_labels = np.zeros((2, len(index.classes) + 1), np.int64)
            is_sound = True
            for samples in stream.shards.samples.tolist():
                faults, keys, labels_of_shard = next(checked)
                hashes.append(keys)
                total_of_labels += labels_of_shard
                is_sound &= not faults
                advance(samples)
                yield from faults
            if hashes:
                yield from _shared_keys(name, stream, hashes, check.open_shard)
            if check.deep and stream.labelled:
                labels[name] = total_of_labels
                if is_sound:  # otherwise pixels are missing
                    yield from _other_pixels(name, stream, total_of_labels[0])


def _other_pixels(name: str, stream: StreamEntry, pixels: NDArray[np.int64]) -> Iterator[Fault]:
    """Whether the index says other pixels of a stream than there are: int64 (classes + 1,)."""
    if stream.class_pixels is not None and list(stream.class_pixels) != pixels.tolist():
        said, there = ", ".join(map(str, stream.class_pixels)), ", ".join(map(str, pixels.tolist()))
        message = f"stream {name!r}: class_pixels says {said}, but its label maps have {there}"
        yield Fault(name, INDEX_NAME, None, "wrong_count", f"{INDEX_NAME}: {message}; write the shards again")


def _shared_keys(
    name: str, stream: StreamEntry, hashes: list[NDArray[np.uint64]], open_shard: OpenShard
) -> Iterator[Fault]:
    """Keys that two shards of a stream have.

    Equal hashes say which shards to read again, so that eight bytes a key are enough, whatever the number of samples.

    Args:
        name: of the stream.
        stream: its entry in the index.
        hashes: of the keys of each shard, uint64 (samples,).
        open_shard: how to open a shard.
    """
    every = np.concatenate(hashes)
    shard_of = np.repeat(np.arange(len(hashes)), [len(keys) for keys in hashes])
    order = np.argsort(every, kind="stable")
    same = np.flatnonzero(every[order][1:] == every[order][:-1])
    repeated = np.unique(every[order[same]])
    first: dict[str, int] = {}
    told: set[tuple[str, int]] = set()
    for number in np.unique(shard_of[np.concatenate([order[same], order[same + 1]])]).tolist():
        file_name = stream.shards.file(number)
        with suppress(OSError, DataError), open_shard(file_name) as file:
            table = read_table(file, file_name, labelled=stream.labelled)
            for key in map(table.key, np.flatnonzero(np.isin(hashes[number], repeated)).tolist()):
                kept = first.setdefault(key, number)
                if kept != number and (key, number) not in told:
                    told.add((key, number))
                    also = f"{stream.shards.file(kept)} has a sample of this key too; rename one"
                    yield Fault(name, file_name, key, "duplicate_key", f"{file_name}: sample {key!r}: {also}")
