"""What is known of the shards that are done: the journal while a folder is written, the list of skipped samples after.

Both are files of JSON lines. A line that was cut off, because the writer was killed, is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskmatch_scale.files import write_whole, writing

JOURNAL_NAME = ".written.jsonl"

SKIPPED_NAME = "skipped.jsonl"
"""One line a sample that was left out: `shard`, `item` (its number in the stream), `reason`, `message`. Reasons are
those of bad samples, and those of tiles that hold nothing (`protocol.LEFT_OUT`)."""


@dataclass(frozen=True)
class Written:
    """A shard that is done.

    Attributes:
        file: its name.
        samples: in it; 0 if all were left out, and then there is no file.
        bytes: of the file.
        sha256: of the file.
        skipped: the lines of `skipped.jsonl` of the samples that were left out.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    skipped: tuple[dict[str, Any], ...] = ()


class Journal:
    """The shards written so far, a line each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Journal:
        self._file = self._path.open("ab", buffering=0)  # a buffer would be written once more when it is closed
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def enter(self, entry: Written) -> None:
        """Add a line, and flush it to the disk.

        Raises:
            OSError: it cannot be written, with the path of the journal. Half of it may have been.
        """
        # The line break comes first, so that a line that was cut off spoils no other line.
        line = b"\n" + json.dumps(asdict(entry)).encode() + b"\n"
        with writing(self._path):
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())


def read_journal(folder: Path) -> dict[str, Written]:
    """The shards that the journal of a folder knows, by file name; none if there is no journal."""
    lines = _lines(folder / JOURNAL_NAME)
    return {line["file"]: Written(**line | {"skipped": tuple(line["skipped"])}) for line in lines}


def read_skipped(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a folder's `skipped.jsonl`, by shard."""
    skipped: dict[str, list[dict[str, Any]]] = {}
    for line in _lines(folder / SKIPPED_NAME):
        skipped.setdefault(line["shard"], []).append(line)
    return skipped


def write_skipped(folder: Path, written: Iterable[Written]) -> None:
    """Write `skipped.jsonl`, or remove it if no sample was left out."""
    lines = [json.dumps(line) + "\n" for entry in written for line in entry.skipped]
    if lines:
        write_whole(folder / SKIPPED_NAME, "".join(lines))
    else:
        (folder / SKIPPED_NAME).unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; none if there is no file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError:
                    continue
