"""What is known of the shards that are done: the journal while a folder is written, the list of skipped samples after.

Both are files of JSON lines. A line that was cut off, because the writer was killed, is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskmatch_scale.files import write_whole, writing

JOURNAL_NAME = ".written.jsonl"

SKIPPED_NAME = "skipped.jsonl"
"""One line a sample that was left out: `shard`, `item` (its number in the stream), `reason`, `message`. Reasons are
those of bad samples, and those of tiles that hold nothing (`protocol.LEFT_OUT`)."""

DUPLICATES_NAME = "duplicates.jsonl"
"""One line an image that was dropped: `stream`, `image`, and `same_as` with those of the image that was kept."""


@dataclass(frozen=True)
class Written:
    """A shard that is done.

    Attributes:
        file: its name.
        samples: in it; 0 if all were left out, and then there is no file.
        bytes: of the file.
        sha256: of the file.
        skipped: the lines of `skipped.jsonl` of the samples that were left out.
        class_pixels: of a labelled shard, pixels of each class, and last those that are ignored; None: not counted.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    skipped: tuple[dict[str, Any], ...] = ()
    class_pixels: tuple[int, ...] | None = None


class Journal:
    """The shards written so far, a line each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Journal:
        self._file = self._path.open("ab", buffering=0)  # a buffer would be written once more when it is closed
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def enter(self, *entries: Written) -> None:
        """Add a line for each shard, and flush them to the disk.

        Raises:
            OSError: they cannot be written, with the path of the journal. A part of them may have been.
        """
        # A line break comes first, so that a line that was cut off spoils no other line.
        lines = b"".join(b"\n" + json.dumps(asdict(entry)).encode() + b"\n" for entry in entries)
        with writing(self._path):
            while lines:
                lines = lines[self._file.write(lines) :]
            os.fsync(self._file.fileno())


def read_journal(folder: Path) -> dict[str, Written]:
    """The shards that the journal of a folder knows, by file name; none if there is no journal."""
    return {line["file"]: _entry(line) for line in _lines(folder / JOURNAL_NAME)}


def _entry(line: Mapping[str, Any]) -> Written:
    pixels = line.get("class_pixels")  # older versions did not count them
    tuples = {"skipped": tuple(line["skipped"]), "class_pixels": None if pixels is None else tuple(pixels)}
    return Written(**{**line, **tuples})


def read_skipped(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a folder's `skipped.jsonl`, by shard."""
    skipped: dict[str, list[dict[str, Any]]] = {}
    for line in _lines(folder / SKIPPED_NAME):
        skipped.setdefault(line["shard"], []).append(line)
    return skipped


def write_skipped(folder: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write `skipped.jsonl`, or remove it if no sample was left out."""
    if text := "".join(json.dumps(line) + "\n" for line in lines):
        write_whole(folder / SKIPPED_NAME, text)
    else:
        (folder / SKIPPED_NAME).unlink(missing_ok=True)


def read_duplicates(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's `duplicates.jsonl`: images that were dropped, because they equal another one."""
    return list(_lines(folder / DUPLICATES_NAME))


def write_duplicates(folder: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Write `duplicates.jsonl`."""
    write_whole(folder / DUPLICATES_NAME, "".join(json.dumps(line) + "\n" for line in lines))


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
