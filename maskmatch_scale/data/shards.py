"""Reading one sample of a shard folder by its place.

The place of a sample is (stream, number within the stream), shards in index order; a tar's member offsets are read from
its headers once per process, after which a sample costs one seek.
"""

from __future__ import annotations

import tarfile
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.index import ShardEntry, ShardIndex, sha256

IMAGE_EXTENSIONS = ("jpg", "jpeg", "webp", "png")
"""Member extensions read as the image, the first that is there; a ``.png`` beside another is the label map."""


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in its shard, still encoded."""

    key: str
    shard: str
    image: bytes
    label: bytes | None


class ShardStream:
    """Random access to the encoded samples of one stream of a shard folder.

    Args:
        root: the shard folder.
        name: the stream's name in the index.

    Raises:
        DataError: the index names a shard that is missing or has another size than it says.
    """

    def __init__(self, root: str | Path, name: str) -> None:
        self.root = Path(root)
        self.name = name
        self.index = ShardIndex.load(root)
        self.entry = self.index.stream(name)
        for shard in self.entry.shards:
            path = self.root / shard.file
            if not path.is_file():
                raise DataError(f"{path}: the index names this shard but the file is not there; write the shards again")
            if (size := path.stat().st_size) != shard.bytes:
                raise DataError(f"{path}: {size} bytes where the index says {shard.bytes}; write the shards again")
        self._starts = [0, *accumulate(shard.samples for shard in self.entry.shards)]

    def __len__(self) -> int:
        """Number of samples."""
        return self._starts[-1]

    def locate(self, number: int) -> tuple[int, int]:
        """(shard number, place within the shard) of sample ``number``."""
        shard = bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def __getitem__(self, number: int) -> RawSample:
        """Read sample ``number`` (0 ≤ number < len).

        Raises:
            DataError: the shard's members are not what the index promised.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)} in stream {self.name!r}")
        shard_number, place = self.locate(number)
        entry = self.entry.shards[shard_number]
        path = self.root / entry.file
        samples = _members(path)
        if len(samples) != entry.samples:
            raise DataError(f"{path}: {len(samples)} samples where the index says {entry.samples}; write it again")
        sample = samples[place]
        if self.entry.labelled and sample.label is None:
            raise DataError(f"{path}: sample {sample.key!r} of labelled stream {self.name!r} has no .png label map")
        with path.open("rb") as file:
            image = _read(file, sample.image)
            label = _read(file, sample.label) if sample.label is not None else None
        return RawSample(sample.key, entry.file, image, label)


@dataclass(frozen=True)
class _Members:
    """Where one sample's members lie in its tar: (offset, size) in bytes."""

    key: str
    image: tuple[int, int]
    label: tuple[int, int] | None


@lru_cache(maxsize=4096)
def _members(path: Path) -> tuple[_Members, ...]:
    """Read a tar's headers and group its members into samples, as webdataset does: adjacent members of one key."""
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                samples[-1][1][extension.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: not a readable tar ({error}); write the shard again") from None
    return tuple(_as_members(path, key, found) for key, found in samples)


def _as_members(path: Path, key: str, found: dict[str, tuple[int, int]]) -> _Members:
    image = next((found[extension] for extension in IMAGE_EXTENSIONS if extension in found), None)
    if image is None:
        raise DataError(f"{path}: sample {key!r} has no image member (one of {', '.join(IMAGE_EXTENSIONS)})")
    label = found.get("png")
    return _Members(key, image, label if label != image else None)


def _read(file: BinaryIO, span: tuple[int, int]) -> bytes:
    offset, size = span
    file.seek(offset)
    return file.read(size)


def verify(root: str | Path) -> list[str]:
    """Check every shard of a folder against its index: size, checksum, sample count.

    Returns:
        One line a fault, naming the shard; an empty list if all is well.
    """
    root = Path(root)
    faults = []
    for name, stream in ShardIndex.load(root).streams.items():
        for shard in stream.shards:
            path = root / shard.file
            if not path.is_file():
                faults.append(f"{path}: missing (stream {name!r})")
            elif (size := path.stat().st_size) != shard.bytes:
                faults.append(f"{path}: {size} bytes where the index says {shard.bytes}")
            elif sha256(path) != shard.sha256:
                faults.append(f"{path}: its bytes are not those the index has the checksum of")
            else:
                faults.extend(_sample_faults(path, shard, stream.labelled))
    return faults


def _sample_faults(path: Path, shard: ShardEntry, labelled: bool) -> list[str]:
    try:
        samples = _members(path)
    except DataError as error:
        return [str(error)]
    if len(samples) != shard.samples:
        return [f"{path}: {len(samples)} samples where the index says {shard.samples}"]
    return [f"{path}: sample {s.key!r} has no label map" for s in samples if labelled and s.label is None]
