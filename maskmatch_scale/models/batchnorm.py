"""BatchNorm over the batch of all ranks, by a callable that sums over them, since `models` know no process group.

torch's own SyncBatchNorm runs on GPUs only, and it is a module that the head would have to call. The head's BatchNorm
is computed in chunks together with the layers after it (`models/classify.py`).

Decision: docs/decisions/0023-batchnorm-over-all-ranks.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskmatch_scale.models.classify import SynchronisedBatchNorm2d
from maskmatch_scale.models.heads import SegformerHead


def synchronise_batchnorm(module: nn.Module, sum_over_ranks: Callable[[Tensor], Tensor]) -> int:
    """From now on every BatchNorm in training normalises by the positions of all ranks, in place.

    Statistics, running statistics and the gradient of the input are then those of one process with all positions.
    Gradients of parameters stay each rank's own sums, which the engine adds up. Names of parameters and buffers do not
    change. A deep copy is synchronised too.

    Args:
        module: a segmenter, or another module that holds a `SegformerHead`.
        sum_over_ranks: gives the sum over ranks of a float vector or matrix, in the same dtype; not in place.

    Returns:
        How many were found; 0 for a model without BatchNorm.

    Raises:
        ValueError: there is a BatchNorm outside `SegformerHead`, which would stay each rank's own. Nothing is changed.
    """
    norms = {m.batch_norm for m in module.modules() if isinstance(m, SegformerHead)}
    served = {norm for norm in norms if type(norm) in (nn.BatchNorm2d, SynchronisedBatchNorm2d)}
    others = [
        f"{name} ({type(m).__name__})"
        for name, m in module.named_modules()
        if isinstance(m, _BatchNorm) and m not in served
    ]
    if others:
        raise ValueError(
            f"batchnorm: {', '.join(others)} cannot be synchronised, only that of SegFormer's head can; "
            "leave it per rank, or freeze it"
        )
    for norm in served:
        norm.__class__ = SynchronisedBatchNorm2d  # the same parameters under the same names
        assert isinstance(norm, SynchronisedBatchNorm2d)
        norm.sum_over_ranks = _Shared(sum_over_ranks)
    return len(served)


def running_statistics(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Every buffer of the BatchNorms in a module, with a copy of it.

    A forward in training changes them, whatever becomes of its step.

    Args:
        module: a segmenter, or another module.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]


def restore_statistics(kept: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Put back what :func:`running_statistics` has copied."""
    for buffer, copy in kept:
        buffer.copy_(copy)


class _Shared:
    """A function that is not copied with a module, since it may hold a process group, which cannot be copied."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def __call__(self, values: Tensor) -> Tensor:
        return self._function(values)

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self
