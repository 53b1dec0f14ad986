"""Floating-point operations of what torch dispatches: products of matrices, attention, convolutions.

torch's own formulas (`torch.utils.flop_counter`), with two corrections for torch 2.14: it does not know the CPU's
kernel of attention, and it counts the backward pass of grouped convolutions as if they were not grouped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)


def convolution_backward_flops(
    grad_out_shape: Sequence[int],
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    """The gradients of input and of weight each take the forward's products once more, grouped or not."""
    forward = conv_flop_count(list(x_shape), list(w_shape), list(grad_out_shape), transposed)
    return int(forward * (output_mask[0] + output_mask[1]))


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


_aten = torch.ops.aten
_FORMULAS: dict[Any, Any] = flop_registry | {
    _aten.convolution_backward: shape_wrapper(convolution_backward_flops),
    _aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention_flops),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward_flops),
}


def flops_of(operation: Any, arguments: Sequence[Any], named: dict[str, Any], result: Any) -> int:
    """FLOPs of one call of an operator that torch dispatches: two for each multiply–add, none for elementwise ones.

    Args:
        operation: an overload, as `torch.ops.aten.mm.default`.
        arguments: of the call; of tensors only the shapes are read.
        named: its keyword arguments.
        result: what it returned.
    """
    formula = _FORMULAS.get(operation.overloadpacket)
    return 0 if formula is None else int(formula(*arguments, **named, out_val=result))
