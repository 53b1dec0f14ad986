"""Deleting what a writer has made in a folder, and nothing else, so that the folder is written anew."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardIndex
from maskmatch_scale.data.shards.offsets import FOLDER, side_car
from maskmatch_scale.data.writing.journal import (
    DUPLICATES_NAME,
    JOURNAL_NAME,
    SKIPPED_NAME,
    Journal,
    Written,
    read_journal,
)
from maskmatch_scale.data.writing.plan import MERGING, PLAN_NAME, read_plan, write_plan
from maskmatch_scale.data.writing.shard import stream_and_number


def delete_written(out: Path) -> None:
    """Delete the shards that the journal or the index of a folder names, and what a writer keeps beside them.

    If it is killed, the folder is one that was begun, and the same call goes on.

    Args:
        out: the folder, locked.

    Raises:
        DataError: the folder was not made by one writing of a data set, which could be repeated.
    """
    if (out / INDEX_NAME).exists():
        _as_begun(out, ShardIndex.load(out))
    elif MERGING in (read_plan(out) or {}):
        raise _not_repeatable(out)
    delete_journaled(out)
    with suppress(OSError):  # it holds something else, or is not there
        (out / FOLDER).rmdir()
    for name in (SKIPPED_NAME, DUPLICATES_NAME, JOURNAL_NAME, PLAN_NAME):
        (out / name).unlink(missing_ok=True)


def delete_journaled(out: Path, keep: Collection[str] = ()) -> None:
    """Delete the shards that the journal of a folder names, and those that were begun.

    Args:
        out: the folder, locked.
        keep: shards that are not deleted.
    """
    for file in read_journal(out):
        if stream_and_number(file) is not None and file not in keep:
            for name in (file, side_car(file)):
                (out / name).unlink(missing_ok=True)
    for begun in out.glob(".*-*.tar"):
        if stream_and_number(begun.name[1:]) is not None:
            begun.unlink()
            if begun.name[1:] not in keep:
                (out / side_car(begun.name[1:])).unlink(missing_ok=True)


def _as_begun(out: Path, index: ShardIndex) -> None:
    """Turn a finished folder into one that was begun: its shards are named by the journal, and no index by then."""
    if "samples_per_shard" not in index.settings or "appended" in index.settings:
        raise _not_repeatable(out)
    with Journal(out / JOURNAL_NAME) as journal:
        journal.enter(
            *(
                Written(shard.file, shard.samples, shard.bytes or 0, shard.sha256 or "")
                for stream in index.streams.values()
                for shard in stream.shards
            )
        )
    write_plan(out, {"source": index.source, **index.settings})
    (out / INDEX_NAME).unlink()


def _not_repeatable(out: Path) -> DataError:
    return DataError(
        f"{out}: not the shards of one `maskmatch shards write`, which could be repeated, so --overwrite does not "
        "delete them; choose another folder, or delete this one yourself"
    )
