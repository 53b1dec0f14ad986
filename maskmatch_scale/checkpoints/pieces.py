"""The state of a run as pieces of named tensors: what engines give to a checkpoint, and what they take from one.

A tensor of the state is flattened in row-major order and cut into pieces. Which rank holds which piece depends on the
number of ranks, the ZeRO stage and the engine. A checkpoint only records where the pieces of each tensor are, so any
other division can be read from it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Some neighbouring elements of one tensor."""

    name: str
    """Kind and name of the tensor: `student/N` (fp32 master, frozen parameter, or buffer), `exp_avg/N` and
    `exp_avg_sq/N` (fp32, AdamW's moments), `ema/N` (fp32 teacher, and its buffers), `rank-R/student/N` and
    `rank-R/ema/N` (a buffer that rank R has of its own). N is the name in the segmenter's `state_dict`."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """Place of the first element in the flattened tensor."""
    values: Tensor
    """(n,) in the tensor's dtype, on any device. It may be the memory in which the state lives: copy it before the next
    step."""


class StoredState(Protocol):
    """The tensors of a checkpoint, read piece by piece."""

    def names(self) -> Collection[str]:
        """Names as in `Piece`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor.

        Raises:
            KeyError: there is no such tensor.
        """

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements ``start`` to ``stop`` (None: the last) of the flattened tensor: (n,) on the CPU, in its dtype.

        Raises:
            KeyError: there is no such tensor.
        """
