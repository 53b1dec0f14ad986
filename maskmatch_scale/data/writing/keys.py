"""The keys of the samples in a shard folder, and the sizes of their images, from the headers of its shards."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.pool import in_threads
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.progress import progress_of


def keys_by_stream(
    folder: Path, index: ShardIndex, streams: Collection[str] | None = None, *, workers: int, progress: bool
) -> dict[str, dict[str, int]]:
    """Bytes of the stored image by key, of all samples of streams. A key takes about 0.1 kB.

    Args:
        folder: on this machine.
        index: of it.
        streams: which; None: all.
        workers: threads that read.
        progress: whether to report on stderr.

    Raises:
        DataError: a shard cannot be read.
    """
    chosen = {name: stream for name, stream in index.streams.items() if streams is None or name in streams}
    total = sum(len(stream.shards) for stream in chosen.values())
    keys: dict[str, dict[str, int]] = {}
    with progress_of("keys", total, unit="shards", wanted=progress and total > 0, elsewhere="lines if slow") as advance:
        for name, stream in chosen.items():
            keys[name] = {}
            files = [shard.file for shard in stream.shards]
            for found in in_threads(partial(_keys_of, folder, labelled=stream.labelled), files, workers):
                keys[name].update(found)
                advance()
    return keys


def _keys_of(folder: Path, file: str, *, labelled: bool) -> dict[str, int]:
    with (folder / file).open("rb") as tar:
        try:
            table = read_table(tar, file, labelled=labelled)
        except BadSample as fault:
            raise DataError(f"{folder / file}: {fault}; copy it there again first") from None
    return {table.key(place): table.image_bytes(place) for place in range(len(table))}
