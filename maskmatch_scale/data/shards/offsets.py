"""Where each sample of a shard begins: side-cars that travel with an index, so that one sample can be read by a range.

All bytes from the first header of a sample up to that of the next are a small tar of their own, which holds this sample
alone. A side-car of ours, ``offsets/NAME.offsets`` beside the index, also has a checksum of these bytes for each
sample, and says of which shard it is. Energon's, ``NAME.tar.idx`` beside the shard, has nothing but the offsets.

Decision: docs/decisions/0071-first-samples-by-ranges.md.
"""

from __future__ import annotations

import hashlib
import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.remote.address import cut_query, is_http
from maskmatch_scale.data.shards.members import TarMembers, read_at
from maskmatch_scale.data.shards.tar import GroupedMembers
from maskmatch_scale.files import write_whole
from maskmatch_scale.redact import is_remote, shown

FOLDER = "offsets"
"""Beside the index."""
_BLOCK = 512
_HEAD = struct.Struct("<8sQ32sQ")
"""Magic, bytes of the shard, its SHA-256, and the number of samples."""
_MAGIC = b"mm-offs1"
_MOST_BLOCKS = 1 << 32
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Offsets:
    """Where the samples of a shard begin.

    Attributes:
        starts: int64 (samples + 1,): byte of the first header of each sample; last, the byte after the last sample.
        checksums: uint32 (samples,): CRC-32 of the bytes of each; None where they are not known.
    """

    starts: NDArray[np.int64]
    checksums: NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.starts) - 1

    def span(self, place: int) -> tuple[int, int]:
        """The first byte of a sample, and the one after its last."""
        return int(self.starts[place]), int(self.starts[place + 1])

    def sample(self, place: int, data: bytes, shard: str, *, labelled: bool) -> tuple[str, bytes, bytes | None] | None:
        """Key, encoded image and label map of a sample, from its bytes, as the whole shard has them.

        Args:
            place: number of the sample.
            data: its bytes (:meth:`span`).
            shard: name of the shard in messages.
            labelled: see :func:`~maskmatch_scale.data.shards.tar.read_table`.

        Returns:
            None if these are not the bytes of one sample without a fault: the whole shard must be asked.
        """
        start, stop = self.span(place)
        if len(data) != stop - start or (self.checksums is not None and crc32(data) != self.checksums[place]):
            return None
        members = TarMembers(io.BytesIO(data), shard)
        try:
            samples, starts = _grouped(members, labelled)
        except BadSample:
            return None
        # They end where a header is due: no member reaches further, and nothing follows.
        if len(starts) != 1 or samples.faults or members.header_at != len(data):
            return None
        at, size, label_at, label_size = samples.spans[0]
        label = data[label_at : label_at + label_size] if label_at >= 0 else None
        return samples.keys[0].decode(), data[at : at + size], label


def _grouped(members: TarMembers, labelled: bool) -> tuple[GroupedMembers, list[int]]:
    """The samples of a tar, and where the first header of each begins."""
    samples = GroupedMembers(labelled)
    starts: list[int] = []
    for name, flag, offset, size in members:
        samples.add(name, flag, offset, size, members.file_size)
        if samples.begun > len(starts):
            starts.append(members.header_at)
    samples.end(False)
    return samples, starts


def side_car(file: str) -> str:
    """Name of the side-car of a shard, beside the index.

    Args:
        file: the shard as the index names it. Secrets in an address do not count: they may be new each day.
    """
    if is_remote(file) or "/" in file:
        return f"{FOLDER}/{hashlib.blake2b(shown(file).encode(), digest_size=16).hexdigest()}.offsets"
    return f"{FOLDER}/{file}.offsets"


def energon_side_car(location: str) -> str | None:
    """Path or address of Energon's side-car of a shard; None if the shard is not called ``….tar``."""
    path, query = cut_query(location) if is_http(location) else (location, "")
    return f"{path}.idx{query}" if path.endswith(".tar") else None


def find_offsets(file: BinaryIO, shard: str, *, labelled: bool) -> Offsets | None:
    """Where the samples of a shard begin, with checksums. All its bytes are read.

    Args:
        file: opened for reading.
        shard: its name in messages.
        labelled: see :func:`~maskmatch_scale.data.shards.tar.read_table`.

    Returns:
        None if the headers show a fault in some sample. Then all samples have to be read from the whole shard: that a
        key comes twice, say, is not seen in the bytes of one of them.

    Raises:
        BadSample: the file is no tar.
    """
    members = TarMembers(file, shard)
    samples, starts = _grouped(members, labelled)
    if members.damage or samples.faults or not starts or members.header_at >= _MOST_BLOCKS * _BLOCK:
        return None
    ends = [*starts[1:], members.header_at]
    checksums = [_checksum(file, start, end) for start, end in zip(starts, ends, strict=True)]
    return Offsets(np.array([*starts, ends[-1]], dtype=np.int64), np.array(checksums, dtype=np.uint32))


def _checksum(file: BinaryIO, start: int, stop: int) -> int:
    value = 0
    for at in range(start, stop, _AT_ONCE):
        value = crc32(read_at(file, at, min(_AT_ONCE, stop - at)), value)
    return value


def packed(offsets: Offsets | None, size: int, sha256: str) -> bytes:
    """The content of a side-car: 8 bytes a sample.

    Args:
        offsets: with checksums; None: the shard has bad samples.
        size: bytes of the shard.
        sha256: its hex digest.
    """
    rows = np.zeros((0 if offsets is None else len(offsets) + 1, 2), dtype="<u4")
    if offsets is not None:
        assert offsets.checksums is not None
        rows[:, 0] = offsets.starts // _BLOCK
        rows[:-1, 1] = offsets.checksums
    data = _HEAD.pack(_MAGIC, size, bytes.fromhex(sha256), 0 if offsets is None else len(offsets)) + rows.tobytes()
    return data + struct.pack("<I", crc32(data))


def write_side_car(tar: BinaryIO, beside: Path, size: int, sha256: str, *, labelled: bool) -> None:
    """Write the side-car of a shard.

    Args:
        tar: the shard, opened for reading. All its bytes are read.
        beside: the side-car; its folder is made if it is not there.
        size: bytes of the shard.
        sha256: its hex digest.
        labelled: see :func:`~maskmatch_scale.data.shards.tar.read_table`.

    Raises:
        BadSample: it is no tar.
    """
    offsets = find_offsets(tar, beside.stem, labelled=labelled)
    beside.parent.mkdir(exist_ok=True)
    write_whole(beside, packed(offsets, size, sha256))


def unpacked(data: bytes, samples: int, size: int | None, sha256: str | None) -> Offsets | None:
    """What :func:`packed` was given; None if it is damaged, of another shard, or of one that has bad samples.

    Args:
        data: the content of a side-car.
        samples: of the shard, as the index says.
        size: bytes of the shard, if they are known.
        sha256: its hex digest, if it is known.
    """
    if len(data) != _HEAD.size + 8 * (samples + 1) + 4:
        return None
    magic, size_then, digest, count = _HEAD.unpack_from(data)
    if (magic, count) != (_MAGIC, samples) or struct.unpack("<I", data[-4:])[0] != crc32(data[:-4]):
        return None
    if size not in (None, size_then) or sha256 not in (None, digest.hex()):
        return None
    rows = np.frombuffer(data, dtype="<u4", count=2 * (samples + 1), offset=_HEAD.size).reshape(-1, 2)
    return _sound(Offsets(rows[:, 0].astype(np.int64) * _BLOCK, rows[:-1, 1].copy()), size_then)


def is_side_car_of(path: Path, sha256: str) -> bool:
    """Whether a file is the side-car of a shard with this hex digest, as far as its first bytes say."""
    try:
        with path.open("rb") as file:
            magic, _, digest, _ = _HEAD.unpack(file.read(_HEAD.size))
    except (OSError, struct.error):
        return False
    return (magic, digest) == (_MAGIC, bytes.fromhex(sha256))


def energon_offsets(data: bytes, samples: int, size: int | None) -> Offsets | None:
    """What Energon's side-car says: little-endian uint64, where each sample begins and where the last one ends.

    Args:
        data: its content.
        samples: of the shard, as the index says.
        size: bytes of the shard, if they are known.

    Returns:
        None if it is not that of such a shard.
    """
    if len(data) != 8 * (samples + 1):
        return None
    starts = np.frombuffer(data, dtype="<u8")
    return _sound(Offsets(starts.astype(np.int64)), size) if bool((starts < 1 << 62).all()) else None


def _sound(offsets: Offsets, size: int | None) -> Offsets | None:
    starts = offsets.starts
    fits = starts[0] >= 0 and (size is None or starts[-1] <= size)
    return offsets if fits and bool((np.diff(starts) > 0).all()) and not (starts % _BLOCK).any() else None
