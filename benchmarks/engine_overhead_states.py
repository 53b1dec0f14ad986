"""Bytes on a rank: tensors that are alive, what ZeRO's formulas say of them, and what collectives are handed."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.engine_overhead_variants import Variant

GRADIENTS = "all gradients there"
"""Backward is over, DeepSpeed has not reduced what it reduces after it: the moment that ZeRO's formulas speak of."""
BEFORE_STEP = "before the optimizer's step"
"""`backward` has returned: what is not this rank's has been freed."""


Storages = dict[tuple[str, int], torch.UntypedStorage]
"""By (device, address). Holds them: an address is not given away while it is known here."""


def storages() -> Storages:
    """Every distinct storage that a tensor in Python reaches.

    What autograd's graph alone holds (activations) is not among them; a parameter's gradient is.
    """
    gc.collect()
    found: Storages = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), Tensor):  # isinstance() would ask proxies, which answer for others
            continue
        gradient = thing.grad if thing.is_leaf else None
        for tensor in (thing, gradient):
            if tensor is not None and tensor.device.type in ("cpu", "cuda") and tensor.layout == torch.strided:
                _add(found, tensor)
    return found


def work_space(deepspeed_engine: Any) -> Storages:
    """DeepSpeed's buckets, whose size is a setting: through them gradients go to the other ranks."""
    found: Storages = {}
    for bucket in getattr(deepspeed_engine.optimizer, "ipg_buckets", {}).values():
        buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        for buffer in buffers:
            if buffer is not None:
                _add(found, buffer)
    return found


def nbytes_beside(now: Storages, known: Storages) -> int:
    """Bytes of what is in ``now`` and not ``known``."""
    return sum(storage.nbytes() for key, storage in now.items() if key not in known)


def _add(found: Storages, tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    if storage.nbytes():
        found[str(tensor.device), storage.data_ptr()] = storage


def formula(variant: Variant, moment: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes a parameter that a rank keeps: (whole, divided by the number of ranks).

    ZeRO (Rajbhandari et al., arXiv 1910.02054, section 5): weights and gradients of 2 bytes, 12 of optimizer state
    (fp32 master and AdamW's two moments). With fp32 weights DeepSpeed keeps a separate fp32 master all the same from
    stage 1 on; DDP and stage 0 have none.
    """
    wide = 2 if variant.precision == "bf16" else 4
    stage = variant.zero_stage or 0
    state = {"weights": wide, "gradients": wide, "master": 4 if stage else 0, "moments": 8}
    divided = {"master", "moments"} if stage else set()
    if stage >= 2 or (stage == 1 and moment == BEFORE_STEP):
        divided |= {"gradients"}
    if stage == 3:
        divided |= {"weights"}
    return (
        {name: size for name, size in state.items() if name not in divided and size},
        {name: size for name, size in state.items() if name in divided},
    )


def formula_text(whole: dict[str, int], divided: dict[str, int]) -> str:
    """For example `4Ψ + 4Ψ + (4+8)Ψ/N`: weights, gradients, master, moments."""
    terms = [f"{size}Ψ" for size in whole.values()]
    if divided:
        sizes = "+".join(map(str, divided.values()))
        terms.append(f"({sizes})Ψ/N" if len(divided) > 1 else f"{sizes}Ψ/N")
    return " + ".join(terms)


class CollectiveBytes(TorchDispatchMode):
    """Counts collectives where torch dispatches them, whoever calls: `bytes` and `calls`.

    The bytes of a collective are those of the larger side, what a rank hands over or what it gets: an all-gather
    counts the gathered whole. A barrier counts as a call, without bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let it pass, and count it if it is one of c10d's."""
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls += 1
            if "barrier" not in str(func):
                sides = [sum(leaf.nbytes for leaf in tree_leaves(a) if isinstance(leaf, Tensor)) for a in args]
                self.bytes += max(sides, default=0)
        return func(*args, **(kwargs or {}))
