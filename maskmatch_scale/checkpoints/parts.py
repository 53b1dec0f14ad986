"""One rank's part of a checkpoint: its pieces copied to host memory, and written as one safetensors file.

safetensors' own `save_file` makes bytes of all tensors before it writes the first, so it needs the memory twice, and
the file would have to be read again for its checksum. The format is a few lines
(https://github.com/huggingface/safetensors#format), so it is written here, and hashed on the way.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskmatch_scale.checkpoints.layout import key
from maskmatch_scale.checkpoints.pieces import Piece

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""safetensors' names."""
_BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class Written:
    """A file that was written."""

    bytes: int
    sha256: str


class HostCopies:
    """Copies pieces to host memory, which is kept for the next time: a run always has the same pieces.

    The memory is pinned for pieces on a GPU, which makes the copies several times faster. torch rounds pinned memory up
    to a power of two for each piece.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Copy pieces, and wait until that is done. The copies that were given before are overwritten.

        Args:
            pieces: each is copied before the next one is asked for.
        """
        copies, devices = [], set()
        for piece in pieces:
            values = piece.values.detach()
            at, on_gpu = key(piece.name, piece.start), values.is_cuda
            copy = self._kept.get(at)
            if copy is None or copy.shape != values.shape or copy.dtype != values.dtype:
                copy = self._kept[at] = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu)
            copy.copy_(values, non_blocking=on_gpu)
            if on_gpu:
                devices.add(values.device)
            copies.append(Piece(piece.name, piece.shape, piece.start, copy))
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return copies


def write_part(path: Path, pieces: Sequence[Piece]) -> Written:
    """Write pieces as a safetensors file, flushed to the disk.

    Args:
        path: of the file.
        pieces: on the CPU. Those without elements are left out.

    Raises:
        OSError: it cannot be written.
    """
    # Wide dtypes first, as safetensors does it, so that every tensor lies at a multiple of its size.
    ordered = sorted((p for p in pieces if p.values.numel()), key=lambda piece: -piece.values.element_size())
    header, end = {}, 0
    for piece in ordered:
        begin, end = end, end + piece.values.numel() * piece.values.element_size()
        entry = {"dtype": DTYPES[piece.values.dtype], "shape": [piece.values.numel()], "data_offsets": [begin, end]}
        header[key(piece.name, piece.start)] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        head = memoryview(len(text).to_bytes(8, "little") + text)
        for view in (head, *(bytes_of(piece.values) for piece in ordered)):
            while len(view):
                done = file.write(view[:_BLOCK_BYTES])
                digest.update(view[:done])
                size += done
                view = view[done:]
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def bytes_of(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor (n,) on the CPU, as bytes."""
    return values.view(torch.uint8).numpy().data
