"""Outputs of cheap modules are computed again in the backward pass, not kept for it.

A linear layer keeps its input for the gradient of its weight. Where this input comes from a GELU or a LayerNorm, which
keep their own inputs anyway, it can be made again in no time: of the 16 C values that a ViT's block keeps for a token
of width C, 6 C are such outputs (4 C under autocast, which keeps 16-bit copies of LayerNorm's). The gradients are the
same to the last bit. (Korthikanti et al., arXiv 2205.05198, select what is computed again by the same reasoning.)
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

CHEAP = (nn.GELU, nn.LayerNorm)


@dataclass(frozen=True)
class _Again:
    """How an output is made again."""

    module: nn.Module
    given: Tensor

    def __call__(self) -> Tensor:
        # Not the module's own call, whose hooks are for forward passes.
        with torch.no_grad():
            output: Tensor = type(self.module).forward(self.module, self.given)
        return output


def mark_cheap_outputs(module: nn.Module) -> None:
    """Prepare every GELU and LayerNorm in a module; it may be copied afterwards."""
    for part in module.modules():
        if isinstance(part, CHEAP):
            part.register_forward_hook(_mark)


def recomputing() -> AbstractContextManager[Any]:
    """A forward pass in this context does not keep marked outputs for its backward pass.

    Hooks on saved tensors that are around it (`torch.autograd.graph.save_on_cpu`) do not see this pass.
    """
    return saved_tensors_hooks(_pack, _unpack)


def _mark(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if isinstance(module, nn.LayerNorm) and _under_autocast(output.device):
        return  # a 16-bit copy is kept, not this output; and the backward pass runs outside autocast
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return  # ZeRO-3 frees the weights before the backward pass asks for the output
    output._again = _Again(module, given[0].detach())  # type: ignore[attr-defined]


def _under_autocast(device: torch.device) -> bool:
    """Whether autocast is on there; never on ``meta``, of which torch will not even be asked."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _pack(tensor: Tensor) -> Any:
    """Of a marked output, or a view of all of it: how it is made again, and its shape."""
    marked = tensor if tensor._base is None else tensor._base
    again = getattr(marked, "_again", None)
    if again is None or tensor.numel() != marked.numel() or not tensor.is_contiguous():
        # Detached: a node that kept its own output would otherwise keep itself alive. Not a parameter: ZeRO-3 puts
        # another memory behind it after the forward.
        return tensor if tensor.is_leaf else tensor.detach()
    return again, tensor.shape


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    again, shape = packed
    output: Tensor = again().view(shape)
    return output
