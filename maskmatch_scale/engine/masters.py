"""fp32 masters of 16-bit weights at ZeRO-1 and 2, and an average of them that is whole on every rank.

At these stages each rank holds a part of the masters. DeepSpeed's own function for a whole master sums over ranks once
for each parameter. These are a few hundred small collectives, and far slower than the number of bytes requires. But the
masters of a parameter group lie in one piece of memory, divided evenly among the ranks. So the average has the same
layout, and the parts are gathered a few megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from maskmatch_scale.engine.ranks import group_device, require_device

CHUNK = 2**22
"""Elements that are gathered at once, over all ranks."""


@dataclass(frozen=True)
class FlatMasters:
    """The masters of one parameter group of an optimizer that DeepSpeed shards."""

    weights: Tensor
    """16-bit (N · n,): every weight of the group, whole on each of N ranks; the parameters are views of it."""
    part: Tensor
    """fp32 (n,): this rank's part of the masters, in the same order; in host memory when offloaded. The optimizer keeps
    its state under this tensor."""
    group: Any
    """Process group of the N ranks."""

    @classmethod
    def of(cls, optimizer: Any) -> list[FlatMasters]:
        """The masters of every group of DeepSpeed's optimizer at ZeRO-1 and 2."""
        if hasattr(optimizer, "bf16_groups_flat"):  # stage 1, with gradients added in fp32
            weights, parts = optimizer.bf16_groups_flat, optimizer.fp32_groups_flat_partition
        else:
            weights, parts = optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups
        pieces = zip(weights, parts, optimizer.real_dp_process_group, strict=True)
        return [cls(whole, part, group) for whole, part, group in pieces]


class FlatAverage:
    """Whole fp32 averages of the masters of one parameter group.

    Args:
        masters: the group.
        pairs: every (average, 16-bit parameter) of the model. Averages whose parameters are in the group are moved into
            one piece of memory and become views of it. `taken` counts them.
    """

    def __init__(self, masters: FlatMasters, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        self._masters = masters
        flat = masters.weights
        self._flat = torch.zeros(flat.numel(), dtype=torch.float32, device=flat.device)
        self.taken = 0
        for average, parameter in pairs:
            if parameter.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr():
                start = parameter.storage_offset() - flat.storage_offset()
                view = self._flat[start : start + parameter.numel()].view(parameter.shape)
                view.copy_(average.detach())
                average.data = view
                self.taken += 1

    def update(self, decay: float) -> None:
        """Average ← decay · average + (1 - decay) · masters; all ranks call it together."""
        ranks, device = dist.get_world_size(self._masters.group), group_device(self._masters.group)
        parts = self._flat.view(ranks, -1)
        size = max(1, CHUNK // ranks)
        for start in range(0, parts.shape[1], size):
            own = self._masters.part.detach()[start : start + size].to(self._flat.device, torch.float32)
            whole = own.new_empty(ranks * len(own))
            dist.all_gather_into_tensor(whole, require_device(own, device), group=self._masters.group)
            parts[:, start : start + size].lerp_(whole.view(ranks, -1), 1 - decay)
