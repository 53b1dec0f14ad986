"""Writing a shard folder from a data source: in parallel, the same bytes every time, and safe to kill at any moment.

Each shard is written under a hidden name. When it is complete and on the disk, it is entered in the folder's journal
with its size, its checksum and the samples left out of it, and renamed. The index is written last. A restart keeps the
shards that are complete and renders the others. Which samples belong to which shard is fixed before the first is
rendered, so a sample that is left out makes its own shard smaller and moves no other sample. `writing/folder.py` lists
the files that lie in the folder meanwhile.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.pool import results, usable_cores
from maskmatch_scale.data.shards.index import ShardEntry, ShardIndex, ShardTable, StreamEntry
from maskmatch_scale.data.shards.label_pixels import pixels_of, sum_of
from maskmatch_scale.data.writing.count_labels import CountLabels, with_pixels
from maskmatch_scale.data.writing.folder import (
    begin,
    complete_side_cars,
    finish,
    is_whole,
    only_writer,
    refuse_empty,
    written_before,
)
from maskmatch_scale.data.writing.journal import JOURNAL_NAME, Journal, Written, write_skipped
from maskmatch_scale.data.writing.parts import Part
from maskmatch_scale.data.writing.protocol import DataSource, EncodedSample, HasBands, LeftOut, Prepares
from maskmatch_scale.data.writing.shard import Rendered, Shard, cut, write_shard
from maskmatch_scale.errors import UserError
from maskmatch_scale.progress import progress_of

SAMPLES_PER_SHARD = 256
"""Default upper limit of samples in a shard."""


def write_shards(
    source: DataSource,
    out: str | Path,
    *,
    workers: int | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    skip_bad: bool = False,
    part: Part | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ShardIndex:
    """Render every sample of a source into tar shards and write their index.

    The shards hold the same bytes whatever the number of workers, and however often the writing was interrupted.

    Args:
        source: what to write.
        out: the folder; made if it is not there. A folder that this source has finished is left as it is.
        workers: processes that render; None takes one for each core this process may use, 1 renders in this process.
            Several are started by `spawn`, so a script that calls this needs an `if __name__ == "__main__":` guard.
        samples_per_shard: upper limit. The shards of a small stream have fewer, so that there are at least eight.
        skip_bad: leave out samples for which the source raises :class:`BadSample`, and list them in `skipped.jsonl`.
            It is not one of the settings: after a bad sample has stopped the writing, call again with it to go on.
        part: write only this part of the shards, into a folder of its own; :func:`merge_shards` puts all parts together
            to what one writer writes. None writes all.
        overwrite: delete what an earlier writer has made in the folder, finished or not, and write anew. Files that no
            writer has made are kept.
        progress: whether to report on stderr, a bar with the time left on a terminal, a line now and then elsewhere.

    Returns:
        The index, as it lies in `out/index.json`.

    Raises:
        DataError: the folder was begun or finished with other settings, or holds shards of which nothing is known;
            another process is writing to it; a sample could not be rendered, or no sample of a stream could.
        UserError: `workers` or `samples_per_shard` is less than 1.
    """
    if samples_per_shard < 1 or (workers is not None and workers < 1):
        raise UserError(f"workers={workers}, samples_per_shard={samples_per_shard}: both must be at least 1")
    out, workers = Path(out), workers or usable_cores()
    identity = identity_of_source(source, samples_per_shard)
    own = identity if part is None else {**identity, "part": str(part)}
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        begun = begin(out, own, lambda: source.streams, overwrite=overwrite)
        if begun.index is not None and is_whole(out, begun.index):
            return begun.index

        streams = source.streams
        if isinstance(source, Prepares):
            streams = source.prepare(out, resumed=begun.resumed, workers=workers, progress=progress)
        cuts = {name: cut(name, stream, samples_per_shard) for name, stream in streams.items()}
        shards = [shard for of_stream in cuts.values() for shard in of_stream]
        shards = shards if part is None else part.share(shards)
        written = written_before(out, begun.index, shards)
        write_missing(source, out, shards, written, workers=workers, skip_bad=skip_bad, progress=progress)
        write_skipped(out, [line for shard in shards for line in written[shard.file].skipped])
        index = ShardIndex(
            source=source.name,
            settings={key: value for key, value in identity.items() if key != "source"},
            classes=source.classes,
            palette=source.palette,
            ignore_index=source.ignore_index,
            bands=source.bands if isinstance(source, HasBands) else (),
            offsets=True,
            part=None if part is None else str(part),
            streams={name: stream_entry(stream.labelled, cuts[name], written) for name, stream in streams.items()},
        )
        if part is None:
            refuse_empty(out, index, [name for name, of_stream in cuts.items() if of_stream])
        complete_side_cars(out, index)
        finish(out, index)
        return index


def identity_of_source(source: DataSource, samples_per_shard: int) -> dict[str, object]:
    """What tells a writing from one with other settings, as JSON values."""
    identity = {"source": source.name, **source.settings, "samples_per_shard": samples_per_shard}
    as_read_back: dict[str, object] = json.loads(json.dumps(identity))  # tuples become lists
    return as_read_back


def write_missing(
    source: DataSource,
    out: Path,
    shards: Sequence[Shard],
    written: dict[str, Written],
    *,
    workers: int,
    skip_bad: bool,
    progress: bool,
) -> None:
    """Write those of the shards that are not in `written`, and add them to it, with the pixels of classes of all."""
    missing = [shard for shard in shards if shard.file not in written]
    with Journal(out / JOURNAL_NAME) as journal:
        for entry in _render_all(source, out, missing, journal, workers, skip_bad, progress):
            written[entry.file] = entry
    labelled = [written[shard.file] for shard in shards if shard.stream.labelled]
    written |= with_pixels(labelled, CountLabels(out, len(source.classes), source.ignore_index), workers)


def _render_all(
    source: DataSource,
    out: Path,
    shards: Sequence[Shard],
    journal: Journal,
    workers: int,
    skip_bad: bool,
    progress: bool,
) -> Iterator[Written]:
    """Write the shards one after the other; their samples are rendered ahead, in `workers` processes."""
    total = sum(len(shard) for shard in shards)
    if not total:
        return
    items = (item for shard in shards for item in shard.items())
    render = _RenderOrFault(source.render, len(source.classes), source.ignore_index)
    killed = "a rendering process was killed (out of memory?); run the same command again: finished shards are kept"
    with (
        progress_of(source.name, total, unit="samples", wanted=progress) as advance,
        results(render, items, workers, if_killed=killed) as samples,
    ):
        for shard in shards:
            of_shard = itertools.islice(samples, len(shard))
            yield write_shard(out, shard, of_shard, journal, skip_bad=skip_bad, advance=advance)


@dataclass(frozen=True)
class _RenderOrFault:
    """Renders an item and counts the pixels of its classes, or returns why it cannot be used: a bad sample does not end
    the pool of processes.
    """

    render: Callable[[Any], EncodedSample]
    classes: int
    ignore_index: int

    def __call__(self, item: Any) -> Rendered:
        try:
            sample = self.render(item)
            if sample.label is None:
                return sample
            pixels = pixels_of(sample.label, f"sample {sample.key!r}", self.classes, self.ignore_index)
            return replace(sample, class_pixels=pixels)
        except (BadSample, LeftOut) as fault:
            return fault


def stream_entry(labelled: bool, shards: Iterable[Shard], written: Mapping[str, Written]) -> StreamEntry:
    """A stream for the index, without shards that came out empty or were not written here."""
    entries = [written[shard.file] for shard in shards if shard.file in written and written[shard.file].samples]
    table = ShardTable(
        ShardEntry(file=entry.file, samples=entry.samples, bytes=entry.bytes, sha256=entry.sha256) for entry in entries
    )
    pixels = sum_of(entry.class_pixels for entry in entries) if labelled else None
    return StreamEntry(labelled=labelled, shards=table, class_pixels=pixels)
