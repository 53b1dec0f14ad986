"""Putting shard folders together: parts that several machines wrote, or data sets of the same classes.

No shard is written: it gets another name by a hard link or by being moved, or it is copied. All are entered in the
journal first, each is whole when it gets its new name, and the index is written last. So it may be killed at any
moment, and the same call goes on.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.pool import usable_cores
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.offsets import FOLDER, is_side_car_of, side_car
from maskmatch_scale.data.writing.folder import begin, complete_side_cars, finish, identity_of, is_whole, only_writer
from maskmatch_scale.data.writing.journal import (
    DUPLICATES_NAME,
    JOURNAL_NAME,
    Journal,
    Written,
    read_journal,
    write_skipped,
)
from maskmatch_scale.data.writing.keys import keys_by_stream
from maskmatch_scale.data.writing.merging import Merged, Piece, ShardFolder, put_together
from maskmatch_scale.data.writing.plan import FOLDERS, MERGING
from maskmatch_scale.errors import UserError
from maskmatch_scale.files import sha256, write_whole, writing
from maskmatch_scale.progress import progress_of

How = Literal["link", "move", "copy"]
"""How a shard gets its new name. `link`: by a hard link, or a copy where there are none. `move`: it is renamed, or
copied and deleted when the index is written. `copy`: it is copied."""


@dataclass(frozen=True)
class Joined:
    """What folders have come to.

    Attributes:
        index: as it lies in the folder.
        notes: what the user should know, a line each.
    """

    index: ShardIndex
    notes: tuple[str, ...]


def merge_shards(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    how: How = "link",
    check: bool = False,
    progress: bool = True,
) -> Joined:
    """Put shard folders together.

    Args:
        folders: all parts of one writing, in any order: the result has the bytes that one writer's has. Or data sets of
            the same classes: their streams are appended to each other in this order, and shards are numbered on.
        out: the folder to make; a new one, or that of an earlier call which was interrupted.
        how: see :data:`How`. The small files of the folders are left where they are also by `move`.
        check: also compare the bytes of every shard with its checksum.
        progress: whether to report on stderr.

    Raises:
        DataError: the folders do not belong together; a shard is not there, or not as its index says; or `out` holds
            something else.
        UserError: a folder is named twice, or is also `out`.
    """
    out = Path(out)
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(resolved):
        if path == out.resolve():
            raise UserError(f"--out {out}: it is one of the folders to put together; name a new one")
        if path in resolved[:number]:
            raise UserError(f"{paths[number]}: named twice")
    if not paths:
        raise UserError("no folders to put together")
    with ExitStack() as locks:
        if how == "move":
            for path in paths:
                if path.is_dir():
                    locks.enter_context(only_writer(path))
        merged = put_together([ShardFolder.load(path) for path in paths])
        out.mkdir(parents=True, exist_ok=True)
        locks.enter_context(only_writer(out))
        _merge(merged, out, how, check, progress)
        is_of_parts = FOLDERS not in merged.index.settings
        return Joined(merged.index, () if is_of_parts else _repeated_keys(out, merged.index, progress))


def _merge(merged: Merged, out: Path, how: How, check: bool, progress: bool) -> None:
    index = merged.index
    identity = json.loads(json.dumps(identity_of(index)))
    begun = begin(out, identity, lambda: index.streams, under_way={MERGING: True}, overwrite=None)
    if begun.index is not None and begun.index.streams != index.streams:
        raise DataError(f"{out}: holds other shards than these folders come to; choose another folder")
    if begun.index is None or not is_whole(out, index) or check:
        _put_all(merged.pieces, out, is_finished=begun.index is not None, how=how, check=check, progress=progress)
        write_skipped(out, merged.skipped)
        if merged.duplicates is not None:
            write_whole(out / DUPLICATES_NAME, merged.duplicates)
        complete_side_cars(out, index)
        finish(out, index)
    if how == "move":
        for piece in merged.pieces:  # those that lay on another disk
            piece.source.unlink(missing_ok=True)


def _repeated_keys(out: Path, index: ShardIndex, progress: bool) -> tuple[str, ...]:
    """A line for each stream in which keys are there several times."""
    keys = keys_by_stream(out, index, workers=usable_cores(), progress=progress)
    counts = {name: index.streams[name].samples - len(of_stream) for name, of_stream in keys.items()}
    return tuple(
        f"stream {name!r}: {count} samples have the key of another one; samples are told apart by their places, but "
        "`labels: FOLDER` cannot match label maps to them by key"
        for name, count in counts.items()
        if count
    )


def _put_all(pieces: Sequence[Piece], out: Path, *, is_finished: bool, how: How, check: bool, progress: bool) -> None:
    journal_then = read_journal(out)

    def is_there(piece: Piece) -> bool:
        """Whether a shard has its new name already."""
        known = journal_then.get(piece.entry.file)
        if not is_finished and (known is None or known.sha256 != piece.entry.sha256):
            return False
        return _size(out / piece.entry.file) == piece.entry.bytes

    there = [is_there(piece) for piece in pieces]
    missing = [piece for piece, done in zip(pieces, there, strict=True) if not done]
    _refuse_missing(missing)
    (out / FOLDER).mkdir(exist_ok=True)
    with Journal(out / JOURNAL_NAME) as journal:
        journal.enter(*map(_written, missing))  # a line without its shard does no harm
    with progress_of("merge", len(pieces), unit="shards", wanted=progress) as advance:
        for piece, done in zip(pieces, there, strict=True):
            target = out / piece.entry.file
            source = target if done else piece.source
            if check and sha256(source) != piece.entry.sha256:
                raise DataError(f"{source}: its bytes are not those that its index says; delete it and write it again")
            if not done:
                _put(piece.source, target, how)
            beside, digest = out / side_car(piece.entry.file), piece.entry.sha256 or ""
            if not is_side_car_of(beside, digest) and is_side_car_of(piece.beside, digest):
                _put(piece.beside, beside, "copy" if how == "copy" else "link")
            advance()


def _written(piece: Piece) -> Written:
    entry = piece.entry
    return Written(entry.file, entry.samples, entry.bytes or 0, entry.sha256 or "")


def _refuse_missing(pieces: Sequence[Piece]) -> None:
    """Raise if a shard is not in its folder in its size."""
    faults = [piece for piece in pieces if _size(piece.source) != piece.entry.bytes]
    if faults:
        path, size = faults[0].source, _size(faults[0].source)
        what = "not there" if size is None else f"{size} bytes, but its index says {faults[0].entry.bytes}"
        more = f" (and {len(faults) - 1} more shards)" if len(faults) > 1 else ""
        raise DataError(f"{path}: {what}{more}; copy the folder again, or run its `maskmatch shards write` again")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _put(source: Path, target: Path, how: How) -> None:
    """Give a file a new name, under which it is whole or not there."""
    begun = target.with_name(f".{target.name}")
    begun.unlink(missing_ok=True)
    with writing(target):
        if how == "move" and _renamed(source, target):
            return
        if how != "link" or not _linked(source, begun):
            try:
                shutil.copyfile(source, begun)
                with begun.open("rb") as file:
                    os.fsync(file.fileno())
            except BaseException:
                begun.unlink(missing_ok=True)
                raise
        begun.replace(target)
        begun.unlink(missing_ok=True)  # two links to one file: both names are there still


def _renamed(source: Path, target: Path) -> bool:
    """Whether a file could be renamed: not from one disk to another, and no link, which may be relative."""
    if source.is_symlink():
        return False
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True


def _linked(source: Path, target: Path) -> bool:
    """Whether a hard link could be made: not all file systems have them, and none has them to another one."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False
    return True
