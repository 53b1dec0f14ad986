"""Checking one shard: its bytes against the index, its headers, and every image and label map in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.images.bands import Channels
from maskmatch_scale.data.images.decode import decode_image, decode_label
from maskmatch_scale.data.shards.index import ShardEntry
from maskmatch_scale.data.shards.tar import TarTable, read_table

OpenShard = Callable[[str], BinaryIO]
"""Opens a shard by its name in the index; raises OSError or DataError if it cannot be opened."""

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a shard folder.

    Attributes:
        stream: name of the stream.
        shard: its file, as the index has it.
        key: of the sample; None if the shard itself is at fault.
        reason: one of :data:`maskmatch_scale.data.faults.REASONS`.
        message: one line that names shard and key, what is wrong and what to do.
    """

    stream: str
    shard: str
    key: str | None
    reason: str
    message: str

    def as_json(self) -> dict[str, str | None]:
        """Its fields, for `--json`."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}, stream {self.stream}]"


@dataclass(frozen=True)
class ShardToCheck:
    """A shard to check.

    Attributes:
        stream: name of the stream.
        labelled: whether the stream has label maps.
        entry: of the index.
    """

    stream: str
    labelled: bool
    entry: ShardEntry


Checked = tuple[list[Fault], NDArray[np.uint64]]
"""Faults of a shard, and a hash of the key of each of its samples, uint64 (samples,)."""


@dataclass(frozen=True)
class ShardCheck:
    """Finds all faults that one shard shows without the other shards. Picklable if `open_shard` is.

    Args:
        num_classes: label values from here on are faults.
        ignore_index: except this.
        deep: whether to decode every image and label map.
        max_pixels: larger images are faults.
        open_shard: how to open a shard.
        channels: all bands of the images; None: they are plain ones.
    """

    num_classes: int
    ignore_index: int
    deep: bool
    max_pixels: int
    open_shard: OpenShard
    channels: Channels | None = None

    def __call__(self, shard: ShardToCheck) -> Checked:
        """Check one shard."""
        entry = shard.entry
        again = "fetch or write it again"
        faults: list[Fault] = []

        def found(reason: str, message: str, key: str | None = None) -> None:
            faults.append(Fault(shard.stream, entry.file, key, reason, message))

        hashes = np.empty(0, np.uint64)
        try:
            with self.open_shard(entry.file) as file:
                size, digest = _size_and_digest(file)
                if entry.bytes is not None and size != entry.bytes:
                    said = f"{size} bytes where the index says {entry.bytes}"
                    found("shard_unreadable", f"{entry.file}: {said}; {again}")
                elif entry.sha256 is not None and digest != entry.sha256:
                    said = "its bytes are not those the index has the checksum of"
                    found("shard_unreadable", f"{entry.file}: {said}; {again}")
                table = read_table(file, entry.file, labelled=shard.labelled)
                hashes = np.fromiter((_hash(table.key(place)) for place in range(len(table))), np.uint64, len(table))
                if len(table) != entry.samples:
                    said = f"{len(table)} samples where the index says {entry.samples}"
                    why = f" ({table.damage})" if table.damage else ""
                    reason = "truncated" if table.truncated else "wrong_count"
                    found(reason, f"{entry.file}: {said}{why}; {again}")
                for place in range(len(table)):
                    try:
                        self._check_sample(file, table, place)
                    except BadSample as bad:
                        found(bad.reason, str(bad), table.key(place))
        except BadSample as bad:
            found(bad.reason, str(bad))
        except (OSError, DataError) as error:
            message = str(error) if entry.file in str(error) else f"{entry.file}: {error}"
            found("shard_unreadable", f"{message}; {again}")
        return faults, hashes

    def _check_sample(self, file: BinaryIO, table: TarTable, place: int) -> None:
        if not self.deep:
            if fault := table.fault(place):
                raise fault
            return
        image, label = table.read(file, place)
        name = f"{table.shard}: sample {table.key(place)!r}"
        pixels = decode_image(image, name, channels=self.channels, max_pixels=self.max_pixels, contiguous=False)
        if label is not None:
            decode_label(
                label,
                name,
                num_classes=self.num_classes,
                ignore_index=self.ignore_index,
                size=(pixels.shape[1], pixels.shape[2]),
                max_pixels=self.max_pixels,
            )


def _size_and_digest(file: BinaryIO) -> tuple[int, str]:
    """Number of bytes and SHA-256 of a file, read from its start."""
    digest, size = hashlib.sha256(), 0
    file.seek(0)
    while block := file.read(_READ_BYTES):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
