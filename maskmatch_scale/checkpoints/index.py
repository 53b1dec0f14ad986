"""`index.json`: where the pieces of each tensor are, and what each file of a checkpoint must be.

{"format": 1, "sha256": of "content" as this module writes it, "content": {
"files": {FILE: {"bytes": …, "sha256": …}},
"tensors": {NAME: {"shape": […], "dtype": "F32", "pieces": [[FILE, START, LENGTH], …]}}}}
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from maskmatch_scale.checkpoints.layout import FORMAT, INDEX, CheckpointError
from maskmatch_scale.files import write_whole


class DamagedError(Exception):
    """A checkpoint is not as it was written. The message says what of it is wrong, without its folder."""


class Span(NamedTuple):
    """Where neighbouring elements of a tensor are."""

    file: str
    start: int
    """Place of the first in the flattened tensor."""
    length: int


@dataclass
class TensorEntry:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it, for example F32."""
    pieces: list[Span] = field(default_factory=list)
    """In the order of `start`; together they have each element once."""


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass
class Index:
    """The contents of `index.json`."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)

    def add(self, name: str, shape: Iterable[int], dtype: str, spans: Iterable[Span]) -> None:
        """Add the pieces of a tensor that one file has.

        Raises:
            ValueError: another file has it in another shape or dtype.
        """
        entry = self.tensors.setdefault(name, TensorEntry(tuple(shape), dtype))
        if (entry.shape, entry.dtype) != (tuple(shape), dtype):
            raise ValueError(f"{name} is {dtype} {tuple(shape)} on one rank and {entry.dtype} {entry.shape} on another")
        entry.pieces.extend(spans)

    def finish(self) -> None:
        """Sort the pieces.

        Raises:
            ValueError: a tensor has an element twice or not at all.
        """
        for name, entry in self.tensors.items():
            entry.pieces.sort(key=lambda span: span.start)
            reached = 0
            for span in entry.pieces:
                if span.start != reached:
                    raise ValueError(f"{name}: its pieces go to element {reached}, and on from {span.start}")
                reached += span.length
            if reached != math.prod(entry.shape):
                raise ValueError(f"{name}: its pieces have {reached} of {math.prod(entry.shape)} elements")

    def digest(self) -> str:
        """SHA-256 of what is written, which tells one checkpoint from another."""
        return _digest(self._content())

    def write(self, folder: Path) -> None:
        """Write it, flushed to the disk."""
        content = self._content()
        write_whole(folder / INDEX, json.dumps({"format": FORMAT, "sha256": _digest(content), "content": content}))

    def _content(self) -> dict[str, Any]:
        return {
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "tensors": {
                name: {"shape": list(entry.shape), "dtype": entry.dtype, "pieces": [list(s) for s in entry.pieces]}
                for name, entry in self.tensors.items()
            },
        }


def read_index(folder: Path) -> Index:
    """Read the index of a checkpoint.

    Raises:
        DamagedError: it is not as it was written, or is missing.
        CheckpointError: it has a format that this version does not know.
    """
    try:
        read: Mapping[str, Any] = json.loads((folder / INDEX).read_bytes())
        written_as = read["format"]
    except FileNotFoundError:
        raise DamagedError(f"{INDEX} is missing") from None
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise DamagedError(f"{INDEX} cannot be read ({type(error).__name__})") from None
    if written_as != FORMAT:
        raise CheckpointError(
            f"{folder}: it has format {written_as}, this version reads format {FORMAT}; use the version of "
            "maskmatch_scale that wrote it"
        )
    content = read.get("content")
    if not isinstance(content, dict) or read.get("sha256") != _digest(content):
        raise DamagedError(f"{INDEX} is not as it was written")
    return Index(
        {name: FileEntry(**entry) for name, entry in content["files"].items()},
        {
            name: TensorEntry(tuple(entry["shape"]), entry["dtype"], [Span(*piece) for piece in entry["pieces"]])
            for name, entry in content["tensors"].items()
        },
    )


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
