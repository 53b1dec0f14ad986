"""A folder that is being written: who may write to it, with which settings, and what an earlier writer has done.

What lies in it::

    .lock                   held while a writer is at work
    .writing.json           the settings of what is being written; a restart with others is refused
    .written.jsonl          the journal: a line for every shard that is done
    labelled-000000.tar     a shard that is done
    offsets/                where the samples of each shard begin
    skipped.jsonl           at the end: every sample that was left out, if there was one
    shards-*.safetensors    the list of shards of a stream that has very many
    index.json              last of all; .writing.json and .written.jsonl are removed
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardIndex
from maskmatch_scale.data.shards.offsets import FOLDER, is_side_car_of, side_car, write_side_car
from maskmatch_scale.data.shards.stored import write_index
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.data.writing.journal import JOURNAL_NAME, SKIPPED_NAME, Written, read_journal, read_skipped
from maskmatch_scale.data.writing.overwrite import delete_written
from maskmatch_scale.data.writing.plan import FOLDERS, MERGING, PLAN_NAME, read_plan, write_plan
from maskmatch_scale.data.writing.shard import Shard
from maskmatch_scale.files import sha256

_LOCK_NAME = ".lock"

_PLACES = {"source": 0, "overlap": 2, "files": 3}
"""Which of several settings that differ is named. Of another source nearly all do; `overlap` has `tile` beside it; new
files alone can be appended. Others have place 1."""
_DIGESTS = {
    "class_names": "give the --classes of then",
    "label_values": "the values of label maps mean something else now: by another --id-map or --classes; or, without "
    "--id-map, 255 is a class now and was ignored, or the reverse, because other label maps are there: then an "
    "--id-map with the meaning of then goes on",
}
"""Of settings that are digests: what has changed if they differ, and what can be done."""


@dataclass(frozen=True)
class Begun:
    """What a writer finds in its folder.

    Attributes:
        index: of a folder that was finished once; None otherwise.
        resumed: whether an earlier writer with the same settings was at work here.
    """

    index: ShardIndex | None
    resumed: bool


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Lock a folder. The kernel drops the lock when the process ends, however it ends.

    Raises:
        DataError: another process holds the lock.
    """
    with (out / _LOCK_NAME).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another process is writing shards here; wait for it") from None
        except OSError:
            pass  # a file system without locks
        yield


def identity_of(index: ShardIndex) -> dict[str, object]:
    """What tells a folder from one that was written with other settings: :func:`begin` compares it."""
    part = {} if index.part is None else {"part": index.part}
    return {"source": index.source, **index.settings, **part}


def begin(
    out: Path,
    identity: Mapping[str, object],
    streams: Callable[[], Iterable[str]],
    *,
    under_way: Mapping[str, object] = MappingProxyType({}),
    overwrite: bool | None = False,
) -> Begun:
    """Begin to write a folder, or go on.

    Args:
        out: the folder, locked.
        identity: name and settings of the source, as JSON values.
        streams: asked for the names of streams only in a new folder, because listing them may take long.
        under_way: what tells this writing from others, as long as it is not finished.
        overwrite: whether to delete what an earlier writer has made; None: that cannot be asked for.

    Raises:
        DataError: the folder was begun or finished with other settings, or holds shards of which nothing is known.
    """
    if overwrite and ((out / INDEX_NAME).exists() or (out / PLAN_NAME).exists()):
        delete_written(out)
    if (out / INDEX_NAME).exists():
        index = ShardIndex.load(out)
        refuse_other_settings(out, "holds shards written", identity_of(index), identity, overwrite)
        return Begun(index, resumed=True)
    if (plan := read_plan(out)) is not None:
        refuse_other_settings(out, "was begun", plan, {**identity, **under_way}, overwrite)
        return Begun(None, resumed=True)
    _refuse_strangers(out, streams())
    for name in (JOURNAL_NAME, SKIPPED_NAME):
        (out / name).unlink(missing_ok=True)
    write_plan(out, {**identity, **under_way})
    return Begun(None, resumed=False)


def is_whole(out: Path, index: ShardIndex) -> bool:
    """Whether every shard of a finished folder is there in its size."""
    return all(
        (out / shard.file).is_file() and (out / shard.file).stat().st_size == shard.bytes
        for stream in index.streams.values()
        for shard in stream.shards
    )


def written_before(out: Path, index: ShardIndex | None, shards: Iterable[Shard]) -> dict[str, Written]:
    """The shards that need not be written again, by file name. Those that were damaged since are deleted.

    Args:
        out: the folder.
        index: of a folder that was finished once.
        shards: all that are to be in it.
    """
    known = read_journal(out)
    if index is not None:
        skipped = read_skipped(out)
        for stream in index.streams.values():
            for entry in stream.shards:
                left_out = tuple(skipped.pop(entry.file, ()))
                if entry.bytes is not None and entry.sha256 is not None:  # else the shard is looked into
                    noted = Written(entry.file, entry.samples, entry.bytes, entry.sha256, left_out)
                    known.setdefault(entry.file, noted)
        for file, lines in skipped.items():
            known.setdefault(file, Written(file, 0, 0, "", tuple(lines)))
    written = {}
    for shard in shards:
        path, done = out / shard.file, known.get(shard.file)
        if done is not None and not done.samples:
            written[shard.file] = done
        elif path.is_file():
            if done is None:
                done = _looked_into(path, shard.stream.labelled)
            if done is not None and done.bytes == path.stat().st_size:
                written[shard.file] = done
            else:
                path.unlink()
    return written


def refuse_empty(out: Path, index: ShardIndex, streams: Iterable[str]) -> None:
    """Raise if one of these streams has come out without a sample.

    Raises:
        DataError: it names the stream.
    """
    for name in streams:
        if not len(index.streams[name].shards):
            raise DataError(f"{out}: no sample of stream {name!r} could be used; {SKIPPED_NAME} says why")


def complete_side_cars(out: Path, index: ShardIndex) -> None:
    """Write those side-cars that are not there: of shards that were written by a version that wrote none.

    What a writer has left that was killed while it wrote one is removed.
    """
    for unfinished in (out / FOLDER).glob(".*"):
        unfinished.unlink()
    for stream in index.streams.values():
        for shard in stream.shards:
            beside = out / side_car(shard.file)
            assert shard.bytes is not None
            assert shard.sha256 is not None
            if not is_side_car_of(beside, shard.sha256):
                with (out / shard.file).open("rb") as tar:
                    write_side_car(tar, beside, shard.bytes, shard.sha256, labelled=stream.labelled)


def finish(out: Path, index: ShardIndex) -> None:
    """Write the index, which marks the folder as finished, and remove what only a writer needs."""
    write_index(out, index)
    for name in (PLAN_NAME, JOURNAL_NAME):
        (out / name).unlink(missing_ok=True)


def _looked_into(path: Path, labelled: bool) -> Written | None:
    """The entry of a shard that is not in the journal, read from the shard; None if that is no whole tar."""
    with path.open("rb") as file:
        try:
            table = read_table(file, path.name, labelled=labelled)
        except BadSample:
            return None
    if table.truncated or not len(table):
        return None
    return Written(path.name, len(table), path.stat().st_size, sha256(path))


def refuse_other_settings(
    out: Path, what: str, written: Mapping[str, object], asked: Mapping[str, object], overwrite: bool | None
) -> None:
    """Raise if a folder was written with other settings than are asked for.

    Args:
        out: the folder.
        what: what it is with the settings `written`.
        written: settings by name.
        asked: settings by name.
        overwrite: whether it is an option to delete what is there; None: it is not.

    Raises:
        DataError: it names the first setting that differs, and what can be done.
    """
    for key in sorted(written.keys() | asked.keys(), key=lambda key: (_PLACES.get(key, 1), key)):
        if written.get(key) != asked.get(key):
            if key == FOLDERS:  # their settings are long
                raise DataError(f"{out}: {what} from other folders than these; choose another folder")
            can = "choose another folder"
            if overwrite is not None and FOLDERS not in written:
                can += ", or --overwrite deletes what was written here and writes anew"
            if key == "files" and what.startswith("holds") and overwrite is not None:
                can = f"--append writes only the images that are new; or {can}"
            if key == "part":
                can = "give each part, and the whole, a folder of its own"
            if key == MERGING:
                can = "finish it by the same `maskmatch shards merge`, or choose another folder"
            if key == "appended":
                can = "--append appends again; or choose another folder"
            told = f"; {_DIGESTS[key]}" if key in _DIGESTS else ""
            raise DataError(
                f"{out}: {what} with {key}={written.get(key)!r}, but {key}={asked.get(key)!r} is asked for{told}; {can}"
            )


def _refuse_strangers(out: Path, streams: Iterable[str]) -> None:
    """Raise if shards lie in a folder that was neither begun nor finished: they are somebody's data."""
    for name in streams:
        if stranger := next(iter(sorted(out.glob(f"{name}-??????.tar"))), None):
            raise DataError(f"{stranger}: exists, but no {INDEX_NAME} says what it holds; choose another folder")
