"""What shard folders come to when they are put together: the index, and where each of its shards comes from.

Parts of one writing (`--part`) come to the folder that one writer makes, byte for byte. Other folders are appended to
each other: streams of equal names one after the other, their shards numbered on.

Decision: docs/decisions/0086-shards-are-put-together-by-links.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardEntry, ShardIndex, ShardTable, StreamEntry
from maskmatch_scale.data.shards.label_pixels import sum_of
from maskmatch_scale.data.shards.offsets import side_car
from maskmatch_scale.data.writing.journal import DUPLICATES_NAME, read_skipped
from maskmatch_scale.data.writing.parts import Part
from maskmatch_scale.data.writing.plan import FOLDERS
from maskmatch_scale.data.writing.shard import file_name, stream_and_number
from maskmatch_scale.errors import UserError

_MEANING = ("classes", "palette", "ignore_index")


@dataclass(frozen=True)
class ShardFolder:
    """A folder that is put together with others."""

    path: Path
    index: ShardIndex

    @classmethod
    def load(cls, path: Path) -> ShardFolder:
        """Read its index.

        Raises:
            DataError: there is none, or it is not one of shards that `shards write` or `shards merge` has written.
        """
        index = ShardIndex.load(path)
        for stream in index.streams.values():
            for shard in stream.shards:
                if stream_and_number(shard.file) is None or shard.bytes is None or shard.sha256 is None:
                    raise DataError(
                        f"{path / INDEX_NAME}: names {shard.file}, which `maskmatch shards write` has not written; "
                        "`maskmatch shards index` makes one index of such folders, without moving shards"
                    )
        return cls(path, index)

    @cached_property
    def skipped(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of `skipped.jsonl`, by shard."""
        return read_skipped(self.path)

    @cached_property
    def duplicates(self) -> bytes | None:
        """The content of `duplicates.jsonl`; None if there is none."""
        path = self.path / DUPLICATES_NAME
        return path.read_bytes() if path.is_file() else None


@dataclass(frozen=True)
class Piece:
    """A shard of a folder.

    Attributes:
        folder: it lies in.
        file: its name there.
        entry: as the index names it when all are put together.
    """

    folder: Path
    file: str
    entry: ShardEntry

    @classmethod
    def of(cls, folder: ShardFolder, entry: ShardEntry, file: str) -> Piece:
        """Of a shard of a folder, and its name when all are put together."""
        return cls(folder.path, entry.file, entry.model_copy(update={"file": file}))

    @property
    def source(self) -> Path:
        """Its file."""
        return self.folder / self.file

    @property
    def beside(self) -> Path:
        """Its side-car, which may not be there."""
        return self.folder / side_car(self.file)


@dataclass(frozen=True)
class Merged:
    """What folders come to.

    Attributes:
        index: of all shards.
        pieces: where each comes from.
        skipped: the lines of `skipped.jsonl`.
        duplicates: the content of `duplicates.jsonl`; None: there is none.
    """

    index: ShardIndex
    pieces: list[Piece]
    skipped: list[dict[str, Any]]
    duplicates: bytes | None


def put_together(folders: Sequence[ShardFolder]) -> Merged:
    """Parts of one writing, or data sets of the same classes.

    Raises:
        DataError: they do not belong together; the message names the folder and the difference, or the missing part.
    """
    parts = [folder for folder in folders if folder.index.part is not None]
    if not parts:
        return _data_sets(folders)
    whole = next((folder for folder in folders if folder.index.part is None), None)
    if whole is not None:
        raise DataError(
            f"{parts[0].path} is part {parts[0].index.part} of a data set, and {whole.path} is a whole one; merge the "
            "parts first"
        )
    return _parts(folders)


def _parts(folders: Sequence[ShardFolder]) -> Merged:
    first = folders[0]
    by_number: dict[int, ShardFolder] = {}
    of = 0
    for folder in folders:
        part = Part.parse(folder.index.part or "")
        of = of or part.of
        if part.of != of:
            raise DataError(f"{folder.path} is part {part}, but {first.path} is part {first.index.part}")
        if part.number in by_number:
            raise DataError(f"{by_number[part.number].path} and {folder.path} are both part {part}; leave one out")
        by_number[part.number] = folder
        _refuse_other_writing(first, folder)
    if missing := [str(Part(number, of)) for number in range(1, of + 1) if number not in by_number]:
        raise DataError(f"part {', '.join(missing)} missing: name the folders of all {of} parts")

    pieces = []
    streams = {}
    for name, entry in first.index.streams.items():
        own = [Piece.of(folder, shard, shard.file) for folder in folders for shard in folder.index.streams[name].shards]
        own.sort(key=lambda piece: stream_and_number(piece.entry.file) or ("", 0))
        skipped = any(_is_of(name, file) for folder in folders for file in folder.skipped)
        if not own and skipped:
            raise DataError(f"no sample of stream {name!r} could be used; skipped.jsonl of each part says why")
        streams[name] = _stream(entry.labelled, own, [folder.index.streams[name] for folder in folders])
        pieces += own
    order = {name: number for number, name in enumerate(streams)}
    lines = [line for folder in folders for of_shard in folder.skipped.values() for line in of_shard]

    def place(line: dict[str, Any]) -> tuple[int, int, int]:
        stream, number = stream_and_number(line["shard"]) or ("", 0)
        return order.get(stream, len(order)), number, line["item"]

    index = first.index.model_copy(update={"part": None, "streams": streams})
    return Merged(index, pieces, sorted(lines, key=place), first.duplicates)


def _refuse_other_writing(first: ShardFolder, folder: ShardFolder) -> None:
    """Raise unless both are parts of one writing."""

    def facts(index: ShardIndex) -> dict[str, object]:
        meaning = {name: getattr(index, name) for name in (*_MEANING, "bands")}
        streams = {f"stream {name}": stream.labelled for name, stream in index.streams.items()}
        return {"source": index.source, **index.settings, **meaning, **streams}

    ours, theirs = facts(first.index), facts(folder.index)
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            raise DataError(
                f"{folder.path}: {key}={theirs.get(key)!r}, but {first.path} has {ours.get(key)!r}; these are no parts "
                "of one writing: write one of them again, from the same files and with the same options"
            )
    if first.duplicates != folder.duplicates:
        raise DataError(
            f"{folder.path / DUPLICATES_NAME}: not that of {first.path}, so the files of the data set differ between "
            "the machines; copy them again, and write the parts anew"
        )


def _data_sets(folders: Sequence[ShardFolder]) -> Merged:
    named = next((folder for folder in folders if folder.index.classes), folders[0])
    for folder in folders:
        for field in (*(_MEANING if folder.index.classes else ()), "bands"):
            ours, theirs = getattr(named.index, field), getattr(folder.index, field)
            if ours != theirs:
                raise DataError(
                    f"{folder.path}: {field} {_difference(theirs, ours)}, as {named.path} has; shards are put together "
                    f"only if their {field} are the same: write one of them again"
                )
    _refuse_equal_shards(folders)

    pieces: list[Piece] = []
    skipped: list[dict[str, Any]] = []
    streams = {}
    for name in dict.fromkeys(name for folder in folders for name in folder.index.streams):
        having = [folder for folder in folders if name in folder.index.streams]
        labelled = having[0].index.streams[name].labelled
        if other := next((each for each in having if each.index.streams[name].labelled != labelled), None):
            raise DataError(
                f"{other.path}: stream {name!r} has {'no ' if labelled else ''}label maps, unlike that of "
                f"{having[0].path}; they cannot be one stream"
            )
        own = []
        first = 0
        for folder in having:
            numbers = [-1]
            for shard in folder.index.streams[name].shards:
                numbers.append(_number(shard.file))
                own.append(Piece.of(folder, shard, file_name(name, first + numbers[-1])))
            for file, lines in folder.skipped.items():
                if _is_of(name, file):
                    numbers.append(_number(file))
                    skipped += [{**line, "shard": file_name(name, first + numbers[-1])} for line in lines]
            first += max(numbers) + 1
        streams[name] = _stream(labelled, own, [folder.index.streams[name] for folder in having])
        pieces += own
    duplicates = [folder.duplicates for folder in folders if folder.duplicates is not None]
    index = named.index.model_copy(
        update={
            "source": "merge",
            "settings": {FOLDERS: [{"source": each.index.source, **each.index.settings} for each in folders]},
            "offsets": True,
            "streams": streams,
        }
    )
    return Merged(index, pieces, skipped, b"".join(duplicates) if duplicates else None)


def _difference(theirs: object, ours: object) -> str:
    """How two values differ, in few words also where both are long."""
    if isinstance(theirs, tuple) and isinstance(ours, tuple) and len(theirs) == len(ours):
        number = next(number for number, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
        return f"has {theirs[number]!r} as number {number}, not {ours[number]!r}"
    if isinstance(theirs, tuple) and isinstance(ours, tuple):
        return f"are {len(theirs)}, not {len(ours)}"
    return f"is {theirs!r}, not {ours!r}"


def _refuse_equal_shards(folders: Sequence[ShardFolder]) -> None:
    """Raise if two shards have the same bytes: the same samples would be there twice."""
    seen: dict[str | None, Path] = {}
    for folder in folders:
        for stream in folder.index.streams.values():
            for shard in stream.shards:
                path = folder.path / shard.file
                if (other := seen.setdefault(shard.sha256, path)) is not path:
                    raise DataError(f"{path}: the same bytes as {other}; its samples would be there twice")


def _stream(labelled: bool, pieces: Sequence[Piece], entries: Iterable[StreamEntry]) -> StreamEntry:
    table = ShardTable(piece.entry for piece in pieces)
    return StreamEntry(labelled=labelled, shards=table, class_pixels=summed_pixels(entries))


def summed_pixels(entries: Iterable[StreamEntry]) -> tuple[int, ...] | None:
    """Pixels of each class in several streams together; None if those of one are not known."""
    return sum_of(entry.class_pixels for entry in entries if len(entry.shards))


def _is_of(stream: str, file: str) -> bool:
    found = stream_and_number(file)
    return found is not None and found[0] == stream


def _number(file: str) -> int:
    found = stream_and_number(file)
    if found is None:
        raise UserError(f"{file}: not the name of a shard that `maskmatch shards write` gives")
    return found[1]
