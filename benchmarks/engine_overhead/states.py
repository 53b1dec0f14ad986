"""Bytes on a rank: of the tensors that are alive, by ZeRO's formulas, and of what collectives transfer."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.engine_overhead.variants import Variant
from maskmatch_scale.planning.states import bytes_a_parameter

GRADIENTS = "all gradients there"
"""Backward has ended, and DeepSpeed has not begun to reduce what it reduces then: the moment of ZeRO's formulas."""
BEFORE_STEP = "before the optimizer's step"
"""`backward` has returned: gradients that are not this rank's have been freed."""


Storages = dict[tuple[str, int], torch.UntypedStorage]
"""Storages by (device, address). They are kept alive here, so that no address is used again."""


def storages() -> Storages:
    """Every distinct storage that a tensor in Python reaches.

    Storages that only autograd's graph holds (activations) are not among them; gradients of parameters are.
    """
    gc.collect()
    found: Storages = {}
    for thing in gc.get_objects():
        # Not isinstance(): a proxy would answer it for the object that it stands for.
        if not issubclass(type(thing), Tensor):
            continue
        gradient = thing.grad if thing.is_leaf else None
        for tensor in (thing, gradient):
            if tensor is not None and tensor.device.type in ("cpu", "cuda") and tensor.layout == torch.strided:
                _add(found, tensor)
    return found


def work_space(deepspeed_engine: Any) -> Storages:
    """DeepSpeed's buckets, in which gradients are sent to other ranks; their size is a setting."""
    found: Storages = {}
    for bucket in getattr(deepspeed_engine.optimizer, "ipg_buckets", {}).values():
        buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        for buffer in buffers:
            if buffer is not None:
                _add(found, buffer)
    return found


def nbytes_beside(now: Storages, known: Storages) -> int:
    """Bytes of the storages that are in ``now`` and not in ``known``."""
    return sum(storage.nbytes() for key, storage in now.items() if key not in known)


def _add(found: Storages, tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    if storage.nbytes():
        found[str(tensor.device), storage.data_ptr()] = storage


def formula(variant: Variant) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes per parameter that a rank keeps: those it keeps whole, and those divided by the number of ranks."""
    return bytes_a_parameter(variant.zero_stage or 0, variant.precision, bf16_gradients=variant.bf16_gradients)


def formula_text(whole: dict[str, int], divided: dict[str, int]) -> str:
    """For example `4Ψ + 4Ψ + (4+8)Ψ/N`: weights, gradients, masters, moments."""
    terms = [f"{size}Ψ" for size in whole.values()]
    if divided:
        sizes = "+".join(map(str, divided.values()))
        terms.append(f"({sizes})Ψ/N" if len(divided) > 1 else f"{sizes}Ψ/N")
    return " + ".join(terms)


class CollectiveBytes(TorchDispatchMode):
    """Counts all collectives that torch dispatches: their `bytes` and `calls`.

    The bytes of a collective are those of the larger side, what a rank sends or what it receives: an all-gather
    counts the whole result. A barrier counts as a call, without bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count it if it is one of c10d's."""
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls += 1
            if "barrier" not in str(func):
                sides = [sum(leaf.nbytes for leaf in tree_leaves(a) if isinstance(leaf, Tensor)) for a in args]
                self.bytes += max(sides, default=0)
        return func(*args, **(kwargs or {}))
