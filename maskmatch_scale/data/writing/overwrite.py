"""Deleting what a writer has made in a folder, and nothing else, so that the folder is written anew."""

from __future__ import annotations

import json
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
from maskmatch_scale.data.writing.shard import stream_and_number
from maskmatch_scale.files import write_whole


def delete_written(out: Path, plan: Path) -> None:
    """Delete the shards that the journal or the index of a folder names, and what a writer keeps beside them.

    If it is killed, the folder is one that was begun, and the same call goes on.

    Args:
        out: the folder, locked.
        plan: the file with the settings of what is being written.

    Raises:
        DataError: the folder was finished, but not by one writing of a data set, which could be repeated.
    """
    if (out / INDEX_NAME).exists():
        _as_begun(out, ShardIndex.load(out), plan)
    for file in read_journal(out):
        if stream_and_number(file) is not None:
            for name in (file, f".{file}", side_car(file)):
                (out / name).unlink(missing_ok=True)
    for begun in out.glob(".*-*.tar"):  # not in the journal yet
        if stream_and_number(begun.name[1:]) is not None:
            begun.unlink()
            (out / side_car(begun.name[1:])).unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else, or is not there
        (out / FOLDER).rmdir()
    for name in (SKIPPED_NAME, DUPLICATES_NAME, JOURNAL_NAME):
        (out / name).unlink(missing_ok=True)
    plan.unlink(missing_ok=True)


def _as_begun(out: Path, index: ShardIndex, plan: Path) -> None:
    """Turn a finished folder into one that was begun: its shards are named by the journal, and no index by then."""
    if "samples_per_shard" not in index.settings or "appended" in index.settings:
        raise DataError(
            f"{out / INDEX_NAME}: not the shards of one `maskmatch shards write`, which could be repeated, so "
            "--overwrite does not delete them; choose another folder, or delete this one yourself"
        )
    with Journal(out / JOURNAL_NAME) as journal:
        journal.enter(
            *(
                Written(shard.file, shard.samples, shard.bytes or 0, shard.sha256 or "")
                for stream in index.streams.values()
                for shard in stream.shards
            )
        )
    write_whole(plan, json.dumps({"source": index.source, **index.settings}, indent=2))
    (out / INDEX_NAME).unlink()
