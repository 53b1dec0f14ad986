"""Records operations and memory of tensors while code runs, with or without memory (`FakeTensorMode`)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskmatch_scale.planning.flops import flops_of


@dataclass(frozen=True)
class Operation:
    """One call of an operator that does something: no view, no tensor that is made without being filled."""

    name: str
    """As torch dispatches it, for example `aten.mm`."""
    flops: int
    """Two for each multiply–add of a product of matrices, an attention or a convolution; 0 for all others."""
    bytes: int
    """Read and written, if nothing stays in a cache."""
    dtype: torch.dtype
    """Of the first tensor given to it, or of the result."""
    backward: bool
    """Whether it belongs to the backward pass."""
    count: int = 1
    """How often it runs; the other figures are those of once."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations, and bytes of the storages that are alive.

    Enter it within a `FakeTensorMode`, if that is used. What exists before it is entered, such as weights, is not
    counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.live_bytes = 0
        """Of the storages that operations have made and that are alive."""
        self.peak_bytes = 0
        """The most that `live_bytes` has been."""
        self.late_peak_bytes = 0
        """The same from the first gradient of a weight on (`first_gradient`)."""
        self._is_late = False
        self.in_backward = False
        """What `Operation.backward` says of the operations that follow."""
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and record it and the memory that it has made."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].untyped_storage().device.type == "meta":
            return 0  # the only values that a pass reads are seeds of dropout, and any seed will do
        named = kwargs or {}
        result = func(*args, **named)
        if func.namespace != "aten":
            return result
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor)]
        before = {id(tensor.untyped_storage()) for tensor in given}
        for tensor in made:
            if id(tensor.untyped_storage()) not in before:
                self.count(tensor)
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if made and not is_view and func not in _NOTHING_RUNS:
            self.operations.append(
                Operation(
                    str(func.overloadpacket),
                    flops_of(func, args, named, result),
                    sum(map(_touched_bytes, given)) + sum(map(_touched_bytes, made)),
                    (given or made)[0].dtype,
                    self.in_backward,
                )
            )
        return result

    def count(self, tensor: Tensor) -> None:
        """Count the memory of a tensor from now on until it is freed."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return
        # torch keeps this Python object as long as the memory lives, so its end is the end of the memory.
        self._alive[key] = (weakref.ref(storage, lambda _: self._remove(key)), size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self._is_late:
            self.late_peak_bytes = max(self.late_peak_bytes, self.live_bytes)

    def begin_peak(self) -> None:
        """Look at all storages again, whose sizes may have changed, and let `peak_bytes` begin anew."""
        for key, (reference, _) in list(self._alive.items()):
            storage = reference()
            if storage is not None:
                self._alive[key] = (reference, storage.nbytes())
        self.live_bytes = self.peak_bytes = sum(size for _, size in self._alive.values())

    def first_gradient(self) -> None:
        """Say that a gradient of a weight is there; only the first time counts."""
        if not self._is_late:
            self._is_late, self.late_peak_bytes = True, self.live_bytes

    def _remove(self, key: int) -> None:
        _, size = self._alive.pop(key)
        self.live_bytes -= size


_NOTHING_RUNS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten.detach.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten._reshape_alias.default,
    torch.ops.aten.promote_types.default,
}


def _touched_bytes(tensor: Tensor) -> int:
    """An expanded tensor has more elements than its memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
