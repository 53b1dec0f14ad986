"""The columns of a table of shards: texts in one piece of memory, and the file that keeps the table of a large stream.

The file lies beside ``index.json``, which names it with its checksum, and is in safetensors' format: nothing in it can
be run, and other tools read it by ``safetensors.numpy.load_file``. Its columns::

    files        uint8 (bytes,), the names of all shards one after the other, in UTF-8
    file_ends    int64 (shards,), where each of them ends
    samples      int64 (shards,)
    bytes        int64 (shards,); 0 = not known
    has_sha256   bool (shards,)
    sha256       uint8 (shards · 32,), zeros where it is not known; empty if none is known
    etags        uint8, as files; not there if none is known. etag_ends as file_ends

Decision: docs/decisions/0070-tables-of-large-streams.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load, save

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.node_arrays import Arrays

SHA256_BYTES = 32
_WANTED = {"files", "file_ends", "samples", "bytes", "has_sha256", "sha256"}


class TableReference(BaseModel):
    """What ``index.json`` says of a stream whose shards are in a file of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str = Field(min_length=1)
    """The file, as that of a shard: relative to the index, an absolute path, or an address."""
    shards: int = Field(ge=0)
    samples: int = Field(ge=0)
    bytes: int = Field(ge=1)
    """Of the file."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Hex digest of the file."""


class Texts:
    """A column of texts in one piece of memory.

    Args:
        joined: uint8 (bytes,), UTF-8.
        ends: int64 (texts,), where each of them ends.
    """

    def __init__(self, joined: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.joined, self.ends = joined, ends

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Texts:
        """The column of these texts."""
        ends = np.cumsum(np.array([len(text) for text in texts], dtype=np.int64))
        return cls(np.frombuffer(b"".join(texts), dtype=np.uint8), ends)

    def __getitem__(self, number: int) -> str:
        start = int(self.ends[number - 1]) if number else 0
        return str(self.joined.data[start : int(self.ends[number])], "utf-8")

    def take(self, numbers: NDArray[np.int64]) -> Texts:
        """The column of these texts, int64 (n,), in this order."""
        starts, ends = np.concatenate([np.zeros(1, np.int64), self.ends]), self.ends[numbers]
        lengths = ends - starts[numbers]
        taken = np.cumsum(lengths)
        # Of each byte of the new column, its place in this one.
        places = np.arange(int(lengths.sum())) + np.repeat(ends - taken, lengths)
        return Texts(self.joined[places], taken)

    def __iter__(self) -> Iterator[str]:
        start, joined = 0, self.joined.tobytes()
        for end in self.ends.tolist():
            yield joined[start:end].decode()
            start = end


def packed(columns: Arrays) -> bytes:
    """The bytes of the file of a table."""
    data: bytes = save(dict(columns))
    return data


def reference(name: str, data: bytes, columns: Arrays) -> TableReference:
    """What ``index.json`` says of the file ``name`` with these bytes."""
    samples = columns["samples"]
    digest = hashlib.sha256(data).hexdigest()
    return TableReference(table=name, shards=len(samples), samples=int(samples.sum()), bytes=len(data), sha256=digest)


def read_table_file(path: Path, said: TableReference) -> Arrays:
    """The columns of a table, from its file on this machine.

    Raises:
        DataError: it cannot be read, or is not the one that the index names.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; the index beside it names this file: copy it, too, or write the index again"
        ) from None
    return unpacked(data, said, str(path))


def unpacked(data: bytes, said: TableReference, where: str) -> Arrays:
    """The columns of a table, from the bytes of its file; ``where`` names it in messages.

    Raises:
        DataError: they are not those that the index speaks of, or not a table.
    """
    if len(data) != said.bytes or hashlib.sha256(data).hexdigest() != said.sha256:
        raise DataError(
            f"{where}: not the table that the index beside it names (its checksum differs); copy both from where they "
            "were written, or write the index again"
        )
    try:
        columns: Arrays = load(data)
    except SafetensorError as error:
        raise DataError(f"{where}: not in safetensors' format ({error}); write the index again") from None
    except KeyError as error:  # a type that NumPy does not have
        raise DataError(f"{where}: a column is {error.args[0]}; write the index again") from None
    if (fault := _fault(columns, said)) is not None:
        raise DataError(f"{where}: {fault}; write the index again")
    return columns


def _fault(columns: Arrays, said: TableReference) -> str | None:
    """What is wrong with columns; None if nothing is."""
    if not _WANTED <= columns.keys() <= {*_WANTED, "etags", "etag_ends"} or ("etags" in columns) != (
        "etag_ends" in columns
    ):
        return f"it has the columns {', '.join(sorted(columns))}"
    for name, column in columns.items():
        texts = name in ("files", "etags", "sha256")
        wanted = np.uint8 if texts else np.bool_ if name == "has_sha256" else np.int64
        if column.dtype != wanted or column.ndim != 1 or (not texts and len(column) != said.shards):
            return f"column {name} is {column.dtype} {column.shape}"
    samples, sizes = columns["samples"], columns["bytes"]
    if (samples < 1).any() or (sizes < 0).any() or sum(samples.tolist()) != said.samples:  # not modulo 2⁶⁴
        return "numbers of samples or bytes out of range"
    if len(columns["sha256"]) != (SHA256_BYTES * said.shards if columns["has_sha256"].any() else 0):
        return "it has not a checksum for each shard"
    for name, ends, least in (("files", "file_ends", 1), ("etags", "etag_ends", 0)):
        if name in columns and not _are_texts(columns[name], columns[ends], least):
            return f"column {name} is not a list of texts"
    return None


def _are_texts(joined: NDArray[np.uint8], ends: NDArray[np.int64], least: int) -> bool:
    """Whether a column is one of texts of at least ``least`` bytes."""
    starts = np.concatenate([np.zeros(1, np.int64), ends])
    if int(starts[-1]) != len(joined) or (np.diff(starts) < least).any():
        return False
    try:
        joined.tobytes().decode()
    except UnicodeDecodeError:
        return False
    # No text begins within a character.
    first = joined[starts[:-1][starts[:-1] < len(joined)]]
    return not ((first & 0xC0) == 0x80).any()
