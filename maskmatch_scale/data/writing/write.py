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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.pool import results, usable_cores
from maskmatch_scale.data.shards.index import ShardEntry, ShardIndex, ShardTable, StreamEntry
from maskmatch_scale.data.shards.offsets import FOLDER, is_side_car_of, side_car, write_side_car
from maskmatch_scale.data.writing.folder import begin, finish, is_whole, only_writer, written_before
from maskmatch_scale.data.writing.journal import JOURNAL_NAME, SKIPPED_NAME, Journal, Written, write_skipped
from maskmatch_scale.data.writing.protocol import DataSource, EncodedSample, HasBands, Prepares
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
    identity = {"source": source.name, **source.settings, "samples_per_shard": samples_per_shard}
    identity = json.loads(json.dumps(identity))  # as it will be read back: tuples become lists
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        begun = begin(out, identity, source)
        if begun.index is not None and is_whole(out, begun.index):
            return begun.index

        streams = source.streams
        if isinstance(source, Prepares):
            streams = source.prepare(out, resumed=begun.resumed, workers=workers, progress=progress)
        shards = {name: cut(name, stream, samples_per_shard) for name, stream in streams.items()}
        written = written_before(out, begun.index, itertools.chain.from_iterable(shards.values()))
        missing = [shard for cuts in shards.values() for shard in cuts if shard.file not in written]
        with Journal(out / JOURNAL_NAME) as journal:
            for entry in _render_all(source, out, missing, journal, workers, skip_bad, progress):
                written[entry.file] = entry

        write_skipped(out, [written[shard.file] for cuts in shards.values() for shard in cuts])
        index = ShardIndex(
            source=source.name,
            settings={key: value for key, value in identity.items() if key != "source"},
            classes=source.classes,
            palette=source.palette,
            ignore_index=source.ignore_index,
            bands=source.bands if isinstance(source, HasBands) else (),
            offsets=True,
            streams={
                name: StreamEntry(labelled=stream.labelled, shards=_table(out, name, shards[name], written))
                for name, stream in streams.items()
            },
        )
        _complete_side_cars(out, index)
        finish(out, index)
        return index


def _complete_side_cars(out: Path, index: ShardIndex) -> None:
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
    killed = "a rendering process was killed (out of memory?); run the same command again: finished shards are kept"
    with (
        progress_of(source.name, total, unit="samples", wanted=progress) as advance,
        results(_RenderOrFault(source.render), items, workers, if_killed=killed) as samples,
    ):
        for shard in shards:
            of_shard = itertools.islice(samples, len(shard))
            yield write_shard(out, shard, of_shard, journal, skip_bad=skip_bad, advance=advance)


@dataclass(frozen=True)
class _RenderOrFault:
    """Renders an item, or returns why it cannot be used: a bad sample does not end the pool of processes."""

    render: Callable[[Any], EncodedSample]

    def __call__(self, item: Any) -> Rendered:
        try:
            return self.render(item)
        except BadSample as fault:
            return fault


def _table(out: Path, name: str, shards: Sequence[Shard], written: Mapping[str, Written]) -> ShardTable:
    """The shards of a stream for the index, without those that came out empty."""
    entries = [written[shard.file] for shard in shards if written[shard.file].samples]
    if shards and not entries:
        raise DataError(f"{out}: no sample of stream {name!r} could be used; {SKIPPED_NAME} says why")
    return ShardTable(
        ShardEntry(file=entry.file, samples=entry.samples, bytes=entry.bytes, sha256=entry.sha256) for entry in entries
    )
