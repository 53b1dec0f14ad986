"""Where DeepSpeed keeps a rank's part of masters and moments at ZeRO-1 to 3.

At ZeRO-1 and 2 the masters of a parameter group lie end to end in one tensor, cut evenly among the ranks, so a rank
holds whole parameters and at most two cut ones. At ZeRO-3 every parameter is cut by itself. DeepSpeed's functions for
one parameter (`safe_get_full_fp32_param` and others) sum each tensor over ranks at ZeRO-1 and 2, and at ZeRO-3 copy
what lies in host memory to the device; here nothing is sent and nothing copied.

Decision: docs/decisions/0043-state-as-parts.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from maskmatch_scale.engine.masters import FlatMasters
from maskmatch_scale.engine.parts import Part, whole_parts


def flat_parts(student: nn.Module, optimizer: Any) -> Iterator[Part]:
    """This rank's part of every trained parameter at ZeRO-1 and 2; (0,) of those that lie on other ranks.

    Args:
        student: whose parameters are views of the optimizer's flat weights.
        optimizer: DeepSpeed's.
    """
    flat = {masters.weights.untyped_storage().data_ptr(): masters for masters in FlatMasters.of(optimizer)}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        masters = flat[parameter.untyped_storage().data_ptr()]
        own = len(masters.part) * dist.get_rank(masters.group)
        place = int(parameter.storage_offset() - masters.weights.storage_offset())
        first = min(max(place, own), place + parameter.numel())
        last = max(min(place + parameter.numel(), own + len(masters.part)), first)
        offset = first - own if last > first else 0
        values = masters.part.detach()[offset : offset + last - first]
        yield Part(name, tuple(parameter.shape), first - place, values, masters.part, offset)


def cut_parts(student: nn.Module) -> Iterator[Part]:
    """This rank's part of every parameter at ZeRO-3, trained or not, without padding."""
    parameter: Any
    for name, parameter in student.named_parameters():
        shape = tuple(parameter.ds_shape)
        size = int(parameter.ds_tensor.ds_numel)
        start = min(size * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
        held = min(size, parameter.ds_numel - start)
        if parameter.requires_grad:
            owner, offset = _place(parameter)
            yield Part(name, shape, start, owner.detach()[offset : offset + held], owner, offset)
        else:
            yield Part(name, shape, start, parameter.ds_tensor.detach()[:held])


def frozen_parts(student: nn.Module, rank: int = 0, ranks: int = 1) -> Iterator[Part]:
    """Parts of the frozen parameters at ZeRO-1 and 2, which every rank has whole."""
    frozen = ((name, parameter) for name, parameter in student.named_parameters() if not parameter.requires_grad)
    return whole_parts(frozen, rank, ranks)


def local_master(parameter: Any) -> Tensor:
    """This rank's part of the fp32 master of a ZeRO-3 parameter, (n,) with padding, where DeepSpeed keeps it.

    DeepSpeed's `safe_get_local_fp32_param` gives the same values, but waits for the device, and copies to it what lies
    in host memory.
    """
    owner, offset = _place(parameter)
    return owner.detach()[offset : offset + int(parameter.ds_tensor.ds_numel)]


@torch.no_grad()
def weights_from_masters(student: nn.Module, optimizer: Any, stage: int) -> None:
    """Make the weights of forward passes from the masters; all ranks call it together.

    Args:
        student: its trained parameters' masters have changed.
        optimizer: DeepSpeed's.
        stage: 1 to 3. At 1 and 2 it gathers the weights, as a step does.
    """
    if stage < 3:
        optimizer.update_lp_params()
        return
    # DeepSpeed's own pair around loading: small parameters are whole between steps, and are gathered anew.
    optimizer.checkpoint_event_prologue()
    parameter: Any
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.ds_tensor.copy_(local_master(parameter))
    optimizer.checkpoint_event_epilogue()


def _place(parameter: Any) -> tuple[Tensor, int]:
    """The tensor that has the master of a ZeRO-3 parameter, under which AdamW's state lies, and the place in it."""
    optimizer = parameter._z3_optimizer
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    owner: Tensor = optimizer.fp32_partitioned_groups_flat[group]
    return owner, offset
