"""One shard: which items of a stream it holds, and how its tar is written."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.shards.label_pixels import sum_of
from maskmatch_scale.data.shards.offsets import side_car, write_side_car
from maskmatch_scale.data.shards.tar import IMAGE_EXTENSIONS
from maskmatch_scale.data.writing.journal import Journal, Written
from maskmatch_scale.data.writing.protocol import EncodedSample, LeftOut, StreamItems
from maskmatch_scale.files import writing
from maskmatch_scale.progress import Advance

MIN_SHARDS = 8
"""A stream is spread over at least so many shards, if it has so many samples, so that each rank has its own shards."""

Rendered = EncodedSample | BadSample | LeftOut
"""A sample, or why there is none."""


@dataclass(frozen=True)
class Shard:
    """Items `start` to `end` of a stream, and the name of the tar they go to."""

    file: str
    stream: StreamItems
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def items(self) -> Sequence[Any]:
        """The items of this shard."""
        return self.stream.items[self.start : self.end]


def file_name(stream: str, number: int) -> str:
    """Name of a shard."""
    return f"{stream}-{number:06d}.tar"


def stream_and_number(file: str) -> tuple[str, int] | None:
    """What :func:`file_name` was given; None if it did not give this name."""
    match = re.fullmatch(r"([^/]+)-(\d{6,})\.tar", file)
    return (match[1], int(match[2])) if match and file_name(match[1], int(match[2])) == file else None


def cut(
    name: str, stream: StreamItems, samples_per_shard: int, *, first: int = 0, at_least: int = MIN_SHARDS
) -> list[Shard]:
    """Spread a stream over shards: consecutive items, in numbers that differ by one at most.

    Args:
        name: of the stream.
        stream: its items.
        samples_per_shard: upper limit.
        first: number of the first shard.
        at_least: so many shards, if there are so many samples.
    """
    total = len(stream.items)
    count = max(min(at_least, total), -(-total // samples_per_shard))
    edges = [total * number // count for number in range(count + 1)] if count else [0]
    return [
        Shard(file_name(name, number), stream, start, end)
        for number, (start, end) in enumerate(itertools.pairwise(edges), first)
    ]


def write_shard(
    out: Path, shard: Shard, samples: Iterator[Rendered], journal: Journal, *, skip_bad: bool, advance: Advance
) -> Written:
    """Write a shard under a hidden name, enter it in the journal, and rename it.

    Args:
        out: the folder.
        shard: which one.
        samples: one for each of its items, in their order.
        journal: of the folder.
        skip_bad: leave out samples that cannot be used, instead of raising.
        advance: called after each sample.

    Raises:
        BadSample: a sample cannot be used.
        DataError: a sample would not read back: see :func:`_check`.
    """
    import webdataset

    begun = out / f".{shard.file}"
    keys: set[str] = set()
    skipped = []
    pixels: list[tuple[int, ...] | None] = []
    with _unless_whole_removed(begun, out / shard.file), begun.open("wb") as file:
        digested = _Digested(file)
        # A fixed time and raw bytes: nothing but the samples decides what the tar holds.
        with webdataset.TarWriter(digested, encoder=False, mtime=0) as tar:
            for number, sample in enumerate(samples, shard.start):
                if isinstance(sample, (BadSample, LeftOut)):
                    if isinstance(sample, BadSample) and not skip_bad:
                        raise BadSample(sample.reason, f"{sample}; --skip-bad (skip_bad=True) leaves such samples out")
                    line = {"shard": shard.file, "item": number, "reason": sample.reason, "message": str(sample)}
                    skipped.append(line)
                else:
                    _check(sample, shard, keys)
                    keys.add(sample.key)
                    members = {"__key__": sample.key, sample.extension: sample.image}
                    if sample.label is not None:
                        members["png"] = sample.label
                    tar.write(members)
                    pixels.append(sample.class_pixels)
                advance()
        file.flush()
        os.fsync(file.fileno())
        if keys:  # its bytes are still in memory
            beside = out / side_car(shard.file)
            with begun.open("rb") as written:
                write_side_car(written, beside, digested.bytes, digested.sha256(), labelled=shard.stream.labelled)
        counted = sum_of(pixels)
        entry = Written(shard.file, len(keys), digested.bytes, digested.sha256(), tuple(skipped), counted)
        if not keys:
            begun.unlink()
            entry = Written(shard.file, 0, 0, "", tuple(skipped))
        # The journal first: it alone knows what was left out. A line without its shard does no harm.
        journal.enter(entry)
    if keys:
        begun.replace(out / shard.file)
    return entry


@contextmanager
def _unless_whole_removed(begun: Path, path: Path) -> Generator[None, None, None]:
    """Remove a shard that was begun if the body fails: on a full disk it would take the room of a whole one.

    Args:
        begun: under its hidden name.
        path: under its own name, which errors of the disk name.
    """
    try:
        with writing(path):
            yield
    except BaseException:
        with suppress(OSError):
            begun.unlink(missing_ok=True)
        raise


class _Digested:
    """Counts and hashes the bytes on their way into a file, so that no shard is read again for its index."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def sha256(self) -> str:
        return self._digest.hexdigest()


def _check(sample: EncodedSample, shard: Shard, keys: set[str]) -> None:
    """Raise :class:`DataError` for a sample that would not read back; `keys` are those of the shard so far."""
    where = f"{shard.file}: sample {sample.key!r}"
    labelled = shard.stream.labelled
    if not sample.key or set("./") & set(sample.key):
        raise DataError(f"{where}: a key may hold no dot and no slash (webdataset cuts names at the first dot)")
    if sample.key in keys:
        raise DataError(f"{shard.file}: two samples are called {sample.key!r}; keys must differ")
    if sample.extension not in IMAGE_EXTENSIONS:
        raise DataError(f"{where}: image extension {sample.extension!r} is none of {', '.join(IMAGE_EXTENSIONS)}")
    if (sample.label is not None) != labelled:
        state = "carries no label map" if labelled else "carries a label map"
        raise DataError(f"{where} {state}, but its stream is {'' if labelled else 'un'}labelled")
    if labelled and sample.extension == "png":
        raise DataError(f"{where}: the .png of a labelled sample is its label map; store the image as jpg or webp")
