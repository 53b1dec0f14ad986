"""Notes of the operations that made tensors, and making the values of one tensor again from them.

What is noted for a tensor is the memory that it lies in, because views and changes in place share it. To make the
values of a memory again, the operations that wrote to it are run once more on other memory, from the last one that
overwrote all of it; before them, in turn, those that made what they read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten
OVERWRITING = {_aten.uniform_.default, _aten.normal_.default, _aten.zero_.default, _aten.fill_.Scalar,
               _aten.fill_.Tensor, _aten.copy_.default}  # fmt: skip
"""Operations after which a tensor's earlier values do not matter. All others are taken to read what they write to."""


@dataclass
class Memory:
    """What tensors lie in; it may be freed, and made again."""

    storage: torch.UntypedStorage
    nbytes: int
    writers: list[tuple[int, bool]] = field(default_factory=list)
    """(number of an operation that wrote to it, whether it overwrote all of it), in their order."""

    @property
    def is_freed(self) -> bool:
        """Whether its values are not there at the moment."""
        return self.storage.nbytes() != self.nbytes

    def fills(self, tensor: Tensor) -> bool:
        """Whether a tensor in it is all that lies in it."""
        return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == self.nbytes


@dataclass(frozen=True)
class Piece:
    """A tensor that lies in a `Memory`, as an argument or a result of a noted operation."""

    memory: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        """The piece that a tensor is."""
        size, stride = tuple(tensor.shape), tuple(tensor.stride())
        return cls(memory_of(tensor), tensor.dtype, size, stride, int(tensor.storage_offset()))

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """The same tensor on other memory."""
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class _Given:
    """An argument of a noted operation that is kept as it is; it must not have changed when it is read again."""

    tensor: Tensor
    version: int


@dataclass(frozen=True)
class _Operation:
    run: Callable[..., Any]
    args: Any
    kwargs: Any
    state: Tensor | None
    """Of torch's generator before it, if it draws from it."""
    reads: frozenset[int]
    """Memories that must have their values before it runs, those that it changes in part included."""
    overwrites: frozenset[int]
    makes: tuple[tuple[int, Piece], ...]
    """New memories: (place among its results, what lies there)."""

    @property
    def touches(self) -> set[int]:
        return {*self.reads, *self.overwrites, *(piece.memory for _, piece in self.makes)}


class Notes:
    """The operations of a build, in their order, and the memories that they wrote to."""

    def __init__(self) -> None:
        self.memories: dict[int, Memory] = {}
        self._operations: list[_Operation] = []

    def __contains__(self, tensor: Tensor) -> bool:
        return memory_of(tensor) in self.memories

    def add(
        self,
        run: Callable[..., Any],
        args: Any,
        kwargs: Any,
        *,
        state: Tensor | None = None,
        changed: list[Tensor] | None = None,
        overwritten: set[int] | None = None,
        made: list[tuple[int, Tensor]] | None = None,
        versions: dict[int, int] | None = None,
    ) -> None:
        """Note an operation.

        Args:
            run: it, called with `args` and `kwargs`.
            args: as they were given.
            kwargs: likewise.
            state: of torch's generator before it, if it draws from it.
            changed: arguments that it writes to.
            overwritten: which of their memories it overwrites whole.
            made: new tensors, each with its place among the results.
            versions: of its arguments before it, by `id`; of those left out, the present one.
        """
        changed, overwritten, made, versions = changed or [], overwritten or set(), made or [], versions or {}
        number = len(self._operations)
        arguments = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf in self]
        target = {id(tensor) for tensor in changed if memory_of(tensor) in overwritten}
        reads = frozenset(memory_of(tensor) for tensor in arguments if id(tensor) not in target)
        for memory in {memory_of(tensor) for tensor in changed}:
            self.memories[memory].writers.append((number, memory in overwritten))
        for _, tensor in made:
            storage = tensor.untyped_storage()
            self.memories[memory_of(tensor)] = Memory(storage, storage.nbytes(), [(number, True)])

        def noted(tensor: Tensor) -> Piece | _Given:
            return Piece.of(tensor) if tensor in self else _Given(tensor, versions.get(id(tensor), tensor._version))

        args, kwargs = tree_map_only(Tensor, noted, (args, kwargs))
        makes = tuple((place, Piece.of(tensor)) for place, tensor in made)
        self._operations.append(_Operation(run, args, kwargs, state, reads, frozenset(overwritten), makes))

    @torch.no_grad()
    def replay(self, memory: int) -> torch.UntypedStorage:
        """Make the values of a memory again, on other memory; torch's generator is as before afterwards.

        Raises:
            RuntimeError: a tensor that they were made from has changed since.
        """
        order = self._needed(memory)
        last = {touched: number for number in order for touched in self._operations[number].touches}
        real: dict[int, torch.UntypedStorage] = {}
        with torch.random.fork_rng(devices=[]):
            for number in order:
                operation = self._operations[number]
                for target in operation.overwrites - real.keys():
                    real[target] = torch.empty(self.memories[target].nbytes, dtype=torch.uint8).untyped_storage()
                args, kwargs = _as_tensors((operation.args, operation.kwargs), real)
                if operation.state is not None:
                    torch.set_rng_state(operation.state)
                results = tree_leaves(operation.run(*args, **kwargs))
                if operation.run is _aten.empty.memory_format:
                    results[0].zero_()  # never overwritten whole: the same on every rank, and each time
                for place, piece in operation.makes:
                    result: Tensor = results[place]
                    layout = tuple(result.shape), tuple(result.stride()), result.storage_offset()
                    if layout != (piece.size, piece.stride, piece.offset):
                        raise RuntimeError(f"{operation.run} has given a tensor of another layout than before")
                    real[piece.memory] = result.untyped_storage()
                for touched in operation.touches:
                    if last[touched] == number and touched != memory:
                        real.pop(touched, None)
        return real[memory]

    def _needed(self, memory: int) -> list[int]:
        """Numbers of the operations that make a memory's values, in their order."""
        needed: set[int] = set()
        waiting = [(memory, len(self._operations))]
        while waiting:
            read, end = waiting.pop()
            for number, whole in reversed(self.memories[read].writers):
                if number >= end:
                    continue
                if number not in needed:
                    needed.add(number)
                    waiting.extend((other, number) for other in self._operations[number].reads)
                if whole:
                    break
        return sorted(needed)


def memory_of(tensor: Tensor) -> int:
    """What tells one piece of memory from another; valid while something holds the memory."""
    address: int = tensor.untyped_storage()._cdata
    return address


def _as_tensors(noted: Any, real: dict[int, torch.UntypedStorage]) -> Any:
    """Arguments of a noted operation, on the memory that replays it."""

    def tensor(value: Piece | _Given) -> Tensor:
        if isinstance(value, Piece):
            return value.on(real[value.memory])
        if value.tensor._version != value.version:
            raise RuntimeError("a tensor that a weight was made from has changed since, so it cannot be made again")
        return value.tensor

    return tree_map_only((Piece, _Given), tensor, noted)
