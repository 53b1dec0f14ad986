"""Reading the tensors of a checkpoint, a slice or a whole one at a time.

Files are read at the places that their headers give, not mapped into memory as safetensors does it: a file on a network
disk that was cut short then gives an error, not a signal that ends the process.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from bisect import bisect_right
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskmatch_scale.checkpoints.index import Index, read_index
from maskmatch_scale.checkpoints.layout import INDEX, key
from maskmatch_scale.checkpoints.parts import DTYPES, bytes_of

_TORCH = {name: dtype for dtype, name in DTYPES.items()}


class StoredTensors:
    """The tensors of a checkpoint as its index has them: a `StoredState` (pieces.py).

    Args:
        folder: of the checkpoint.
        index: of it, if it was read already.
    """

    def __init__(self, folder: Path, index: Index | None = None) -> None:
        self._folder = folder
        self._index = index or read_index(folder)
        self._places: dict[str, dict[str, int]] = {}
        """For each file and key the place of the first byte of its values."""

    def names(self) -> Collection[str]:
        """See `StoredState`."""
        return self._index.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `StoredState`."""
        return self._index.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored.

        Raises:
            KeyError: there is no such tensor.
        """
        return _TORCH[self._index.tensors[name].dtype]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `StoredState`. The memory is the tensor's own; of the files only these bytes are read.

        Raises:
            OSError: a file cannot be read, or ends too early.
        """
        entry = self._index.tensors[name]
        size = math.prod(entry.shape)
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise IndexError(f"{name}: elements {start} to {stop} of {size}")
        values = torch.empty(stop - start, dtype=_TORCH[entry.dtype])
        if start == stop:
            return values
        into, width = bytes_of(values), values.element_size()
        first = bisect_right(entry.pieces, start, key=lambda span: span.start) - 1
        for span in entry.pieces[first:]:
            begin, end = max(start, span.start), min(stop, span.start + span.length)
            if begin >= stop:
                break
            place = self._places_in(span.file)[key(name, span.start)] + (begin - span.start) * width
            _read(self._folder / span.file, place, into[(begin - start) * width : (end - start) * width])
        return values

    def _places_in(self, file: str) -> dict[str, int]:
        if file not in self._places:
            path, size = self._folder / file, bytearray(8)
            _read(path, 0, memoryview(size))
            header = bytearray(int.from_bytes(size, "little"))
            _read(path, 8, memoryview(header))
            entries: dict[str, Any] = json.loads(header)
            self._places[file] = {k: 8 + len(header) + e["data_offsets"][0] for k, e in entries.items()}
        return self._places[file]


def _read(path: Path, place: int, into: memoryview) -> None:
    """Fill a buffer with the bytes of a file from a place on."""
    with path.open("rb", buffering=0) as file:
        while len(into):
            done = os.preadv(file.fileno(), [into], place)
            if not done:
                raise OSError(f"{path}: it ends too early")
            place, into = place + done, into[done:]


class Weights(Mapping[str, Tensor]):
    """The whole weights of a checkpoint's student or teacher, under the segmenter's own names; read one at a time.

    Args:
        stored: the tensors of the checkpoint.
        kind: `ema` or `student`.
    """

    def __init__(self, stored: StoredTensors, kind: str) -> None:
        self._stored, self._prefix = stored, f"{kind}/"
        self._names = [n.removeprefix(self._prefix) for n in stored.names() if n.startswith(self._prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it.

        Raises:
            KeyError: there is no such tensor.
        """
        return self._stored.shape(self._prefix + name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it.

        Raises:
            KeyError: there is no such tensor.
        """
        return self._stored.dtype(self._prefix + name)

    def __getitem__(self, name: str) -> Tensor:
        full = self._prefix + name
        return self._stored.read(full).view(self._stored.shape(full))

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_weights(folder: Path, kind: str) -> Weights:
    """The whole weights of a checkpoint; ``kind`` is `ema` or `student`.

    Raises:
        DamagedError: its index is not as it was written.
    """
    return Weights(StoredTensors(folder), kind)


@contextmanager
def being_read(folder: Path) -> Generator[None, None, None]:
    """While the body runs, no run on this file system deletes the checkpoint (:func:`unless_read`).

    On a file system without locks nothing is promised.
    """
    descriptor = os.open(folder / INDEX, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        _unlock(descriptor)


@contextmanager
def unless_read(folder: Path) -> Generator[bool, None, None]:
    """Gives False if somebody reads the checkpoint (:func:`being_read`). While the body runs, nobody begins to."""
    try:
        # Some network file systems lock a file only for those who may write to it.
        descriptor = os.open(folder / INDEX, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield True  # without an index nobody can read it
        return
    try:
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass  # a file system without locks
        yield free
    finally:
        _unlock(descriptor)


def _unlock(descriptor: int) -> None:
    # Closing alone does not release it while a loader process that was forked meanwhile has the file open.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
