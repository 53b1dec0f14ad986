"""Pixels of each class in shards that were written before: those that the journal of a writer says nothing of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maskmatch_scale.data.pool import results
from maskmatch_scale.data.shards.label_pixels import pixels_of, sum_of
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.data.writing.journal import Written


@dataclass(frozen=True)
class CountLabels:
    """Counts the pixels of each class in a labelled shard; picklable.

    Args:
        folder: where the shard is.
        classes: number of classes.
        ignore_index: value of ignored pixels.
    """

    folder: Path
    classes: int
    ignore_index: int

    def __call__(self, name: str) -> tuple[int, ...] | None:
        """Pixels of each class, and last those that are ignored: classes + 1 numbers.

        Raises:
            BadSample: a sample or its label map cannot be read.
        """
        with (self.folder / name).open("rb") as file:
            table = read_table(file, name, labelled=True)
            return sum_of(self._of_sample(table.read(file, place)[1], name) for place in range(len(table)))

    def _of_sample(self, label: bytes | None, shard: str) -> tuple[int, ...] | None:
        return None if label is None else pixels_of(label, shard, self.classes, self.ignore_index)


def with_pixels(entries: Sequence[Written], count: CountLabels, workers: int) -> dict[str, Written]:
    """Entries of labelled shards, by file name, with the pixels of their classes; what is not known is counted.

    Args:
        entries: of the journal, or read from shards.
        count: of the folder.
        workers: processes.

    Raises:
        DataError: a shard cannot be read; a process was killed.
    """
    unknown = [entry for entry in entries if entry.samples and entry.class_pixels is None]
    killed = "a process that counts labels was killed (out of memory?); run the same command again"
    files = [entry.file for entry in unknown]
    with results(count, files, min(workers, len(files)), if_killed=killed) as counts:
        counted = {
            entry.file: replace(entry, class_pixels=pixels) for entry, pixels in zip(unknown, counts, strict=True)
        }
    return {entry.file: counted.get(entry.file, entry) for entry in entries}
