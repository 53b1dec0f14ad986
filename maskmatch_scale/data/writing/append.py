"""Appending to a shard folder: the samples that its source has got since are written to new shards.

Shards that are there stay as they are, and so does the stream of every sample in them. The samples of the folder are
known by the keys in the headers of its shards. The new index is written last: until then the old one is valid, and
training may go on with it.

Decision: docs/decisions/0086-shards-are-put-together-by-links.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.pool import usable_cores
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardIndex, ShardTable, StreamEntry
from maskmatch_scale.data.writing.folder import (
    complete_side_cars,
    finish,
    identity_of,
    is_whole,
    only_writer,
    refuse_empty,
    refuse_other_settings,
    written_before,
)
from maskmatch_scale.data.writing.journal import JOURNAL_NAME, SKIPPED_NAME, read_journal, write_skipped
from maskmatch_scale.data.writing.keys import keys_by_stream
from maskmatch_scale.data.writing.merging import summed_pixels
from maskmatch_scale.data.writing.overwrite import delete_journaled
from maskmatch_scale.data.writing.plan import PLAN_NAME, read_plan, write_plan
from maskmatch_scale.data.writing.protocol import Appends, DataSource, StreamItems
from maskmatch_scale.data.writing.shard import MIN_SHARDS, Shard, cut, stream_and_number
from maskmatch_scale.data.writing.write import SAMPLES_PER_SHARD, identity_of_source, stream_entry, write_missing
from maskmatch_scale.errors import UserError

_FILES = "files"
"""The setting that says which files a source has: the one that may differ."""
_VERSIONS = ("pillow",)
"""Settings that decide how bytes come out, but not what they mean: new shards may be written with others."""
_APPENDED = "appended"
"""The setting with what `files` was before each time that a folder was appended to."""


@dataclass(frozen=True)
class Appended:
    """What appending has come to.

    Attributes:
        index: as it lies in the folder.
        samples: that were written, by stream.
        notes: what the user should know, a line each.
    """

    index: ShardIndex
    samples: Mapping[str, int]
    notes: tuple[str, ...]


def append_shards(
    source: DataSource,
    out: str | Path,
    *,
    workers: int | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Appended:
    """Write the samples of a source that a folder does not have to new shards of its streams.

    Interrupted, it goes on where it was. If there is nothing new, the folder stays as it is.

    Args:
        source: with the settings that the folder was written with; only its files may be others.
        out: a folder that :func:`write_shards` has finished with this source.
        workers: as in :func:`write_shards`.
        samples_per_shard: as the folder was written with.
        skip_bad: as in :func:`write_shards`. Samples that were left out before are tried again.
        overwrite: delete what an append has written that was not finished, and begin it anew.
        progress: whether to report on stderr.

    Raises:
        DataError: the folder is not finished, is a part, lacks a shard or was written with other settings; the source
            cannot be appended; an append with other files was begun; or as in :func:`write_shards`.
        UserError: `workers` or `samples_per_shard` is less than 1.
    """
    if samples_per_shard < 1 or (workers is not None and workers < 1):
        raise UserError(f"workers={workers}, samples_per_shard={samples_per_shard}: both must be at least 1")
    out, workers = Path(out), workers or usable_cores()
    identity = identity_of_source(source, samples_per_shard)
    if not isinstance(source, Appends) or "tile" in identity:
        raise DataError(
            f"--append: source {source.name} cannot tell new samples{' of tiles' if 'tile' in identity else ''}; write "
            "them to a folder of their own, and put both together by `maskmatch shards merge`"
        )
    if not (out / INDEX_NAME).is_file():
        raise DataError(f"{out}: no {INDEX_NAME}, so nothing to append to; write it without --append first")
    with only_writer(out):
        index = ShardIndex.load(out)
        _refuse_others(out, index, identity, source)
        _drop_finished(out, index)
        if identity[_FILES] == index.settings[_FILES] and not (out / SKIPPED_NAME).exists():
            return Appended(index, {}, ())
        plan = {**identity, "append_to": index.settings[_FILES]}
        resumed = _resumes(out, index, plan, overwrite)
        added = source.added(
            out, keys_by_stream(out, index, workers=workers, progress=progress), workers=workers, progress=progress
        )
        cuts = {name: _cut(index, name, stream, samples_per_shard) for name, stream in added.streams.items()}
        shards = [shard for of_stream in cuts.values() for shard in of_stream]
        if not resumed:
            _refuse_strangers(out, shards)
            write_plan(out, plan)
        written = written_before(out, None, shards)
        write_missing(source, out, shards, written, workers=workers, skip_bad=skip_bad, progress=progress)
        write_skipped(out, [line for shard in shards for line in written[shard.file].skipped])
        entries = {name: stream_entry(added.streams[name].labelled, cuts[name], written) for name in cuts}
        if identity[_FILES] != index.settings[_FILES] or any(entry.samples for entry in entries.values()):
            index = _index(index, entries, identity)
            refuse_empty(out, index, entries)
        complete_side_cars(out, index)
        finish(out, index)
        return Appended(index, {name: entry.samples for name, entry in entries.items()}, added.notes)


def _refuse_others(out: Path, index: ShardIndex, identity: Mapping[str, object], source: DataSource) -> None:
    """Raise unless a folder was written with these settings but for its files, and all its shards are there."""
    if index.part is not None:
        raise DataError(f"{out}: only part {index.part} of a data set; merge the parts, and append to the result")
    if index.source != source.name:
        raise DataError(
            f"{out}: written by source {index.source}, not {source.name}; write the new images to a folder of their "
            "own, and put both together by `maskmatch shards merge`"
        )
    free = dict.fromkeys((_FILES, _APPENDED, *_VERSIONS))
    refuse_other_settings(out, "holds shards written", {**identity_of(index), **free}, {**identity, **free}, None)
    for name in ("classes", "palette", "ignore_index"):
        theirs, ours = getattr(index, name), getattr(source, name)
        if theirs != ours:
            raise DataError(f"{out}: {name} is {theirs!r}, but {ours!r} of the samples to append")
    if _FILES not in index.settings:
        raise DataError(f"{out}: its {INDEX_NAME} does not say which files it was written from; choose another folder")
    if not is_whole(out, index):
        raise DataError(f"{out}: a shard that {INDEX_NAME} names is not there in its size; copy it there again first")


def _drop_finished(out: Path, index: ShardIndex) -> None:
    """Remove what a writer has left that was killed when the index was written."""
    plan = read_plan(out)
    if plan is not None and plan.get("append_to") != index.settings[_FILES]:
        delete_journaled(out, keep=_files(index))
        for name in (JOURNAL_NAME, PLAN_NAME):
            (out / name).unlink(missing_ok=True)


def _files(index: ShardIndex) -> set[str]:
    return {shard.file for stream in index.streams.values() for shard in stream.shards}


def _resumes(out: Path, index: ShardIndex, plan: Mapping[str, object], overwrite: bool) -> bool:
    """Whether an earlier call has begun this append. What one has written that is not to be finished is deleted."""
    then = read_plan(out)
    if then == plan and not overwrite:
        return True
    if then is not None and not overwrite and read_journal(out):
        raise DataError(
            f"{out}: an append of other files or by other versions was begun ({then[_FILES]}; now {plan[_FILES]}); "
            "finish it with those, or --append --overwrite deletes what it has written and begins anew"
        )
    delete_journaled(out, keep=_files(index))
    for name in (JOURNAL_NAME, PLAN_NAME):
        (out / name).unlink(missing_ok=True)
    return False


def _cut(index: ShardIndex, name: str, stream: StreamItems, samples_per_shard: int) -> list[Shard]:
    """New shards of a stream, numbered on."""
    before = index.streams.get(name)
    if before is None:
        return cut(name, stream, samples_per_shard)
    if before.labelled != stream.labelled:
        raise DataError(
            f"stream {name!r} has {'' if before.labelled else 'no '}label maps, unlike the new samples of it"
        )
    numbers = [found[1] for shard in before.shards if (found := stream_and_number(shard.file)) is not None]
    at_least = max(1, MIN_SHARDS - len(before.shards))
    return cut(name, stream, samples_per_shard, first=max(numbers, default=-1) + 1, at_least=at_least)


def _refuse_strangers(out: Path, shards: Sequence[Shard]) -> None:
    """Raise if there is a file already where a new shard is to be: it is somebody's data."""
    for shard in shards:
        if (out / shard.file).exists():
            raise DataError(f"{out / shard.file}: exists, but {INDEX_NAME} does not name it; move it away")


def _index(index: ShardIndex, entries: Mapping[str, StreamEntry], identity: Mapping[str, object]) -> ShardIndex:
    streams = dict(index.streams)
    for name, entry in entries.items():
        both = [streams[name], entry] if name in streams else [entry]
        streams[name] = StreamEntry(
            labelled=entry.labelled,
            shards=ShardTable(shard for one in both for shard in one.shards),
            class_pixels=summed_pixels(both),
        )
    before = index.settings.get(_APPENDED, [])
    assert isinstance(before, list)
    history = [*before, index.settings[_FILES]]
    asked = {key: value for key, value in identity.items() if key != "source"}
    settings = {**index.settings, **asked, _APPENDED: history}
    return index.model_copy(update={"settings": settings, "streams": streams})
