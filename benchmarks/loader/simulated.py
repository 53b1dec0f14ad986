"""Indexes of more shards than there are: what a run over a very large data set would read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.loader.task import SAMPLES_PER_SHARD
from maskmatch_scale.data.shards.index import ShardEntry, ShardTable


def write_simulated_index(path: Path, shards: int, table: ShardTable | None = None) -> None:
    """Write an index of so many shards: those of ``table`` over and over, or shards that do not exist."""
    with path.open("wb") as out:
        out.writelines(simulated_index(shards, "unlabelled-{:08d}.tar", table or ()))


def simulated_index(shards: int, name: str, table: Sequence[ShardEntry] = ()) -> Iterator[bytes]:
    """The lines of an index of so many shards.

    Args:
        shards: how many.
        name: of a shard, formatted with its number.
        table: shards that exist; if there are any, the entries repeat them over and over.
    """
    yield b'{"format": 1, "source": "simulated", "streams": {"unlabelled": {"labelled": false, "shards": [\n'
    real = [(entry.file, entry.samples, entry.bytes) for entry in table]
    for number in range(shards):
        digest = hashlib.sha256(b"%d" % number).hexdigest()
        file, samples, size = (name.format(number), SAMPLES_PER_SHARD, 25_000_000)
        if real:
            file, samples, size = real[number % len(real)]
        end = "" if number == shards - 1 else ","
        entry = f'{{"file": "{file}", "samples": {samples}, "bytes": {size}, "sha256": "{digest}"}}{end}\n'
        yield entry.encode()
    yield b"]}}}\n"
