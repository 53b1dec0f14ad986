"""transformers' convolutions and Mix-FFN, made to run on unit tokens too; parameters and their names stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.segformer.modeling_segformer import SegformerMixMLP

from maskmatch_scale.models.units import Halo


class PatchConv2d(nn.Conv2d):
    """A convolution that also takes what its kernel sees, already cut out of the maps, and is then a matrix product.

    It is called as a module, so that hooks run. ZeRO-3 gathers the weight by hooks, also when a checkpointed block is
    run again in backward.
    """

    def forward(self, x: Tensor, cut: bool = False) -> Tensor:
        """Convolve maps (B, C, h, w) as nn.Conv2d does, or what was cut out of them.

        Args:
            x: maps. If `cut`: windows (n, C, side, side) that bring their own padding, to (n, C_out, r, r); or patches
                (n, kernel² · C), taps row-major and channels last, to (n, C_out). The product with patches is much
                faster than a convolution whose output is one to four pixels.
            cut: whether x was cut out of maps.
        """
        if not cut:
            return super().forward(_with_batch_stride(x))
        if x.ndim == 2:
            return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return F.conv2d(x, self.weight, self.bias, self.stride)


class HaloConv2d(nn.Conv2d):
    """A depthwise convolution that also runs on unit tokens alone. `PatchConv2d` says why it is called as a module."""

    def forward(self, x: Tensor, halo: Halo | None = None) -> Tensor:
        """Convolve maps (B, C, h, w), or unit tokens (B, k · r², C) with their neighbours by `halo`."""
        if halo is None:
            return super().forward(_with_batch_stride(x))
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        mixed: Tensor = _HaloDepthwise.apply(x.flatten(0, 1), weight, bias, halo)
        return mixed.view(x.shape)


class _HaloDepthwise(torch.autograd.Function):
    """Depthwise convolution of unit tokens (B · k · r², C), masked neighbours and the outside read as zero.

    With stride 1 and an odd kernel, the gradient of the input is the same convolution of the gradient with the kernel
    turned round. So backward gathers with the same plan instead of scattering, and sums in a fixed order. Only the
    tokens are kept for it; the windows are up to nine times larger.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None, halo: Halo) -> Tensor:
        ctx.save_for_backward(tokens, weight, bias)
        ctx.halo = halo
        return token_rows(F.conv2d(halo.windows(tokens), weight, bias, groups=len(weight)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        tokens, weight, bias = ctx.saved_tensors
        grad_tokens = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            turned = F.conv2d(ctx.halo.windows(gradient), weight.flip(2, 3), groups=len(weight))
            grad_tokens = token_rows(turned)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            windows = ctx.halo.windows(tokens)
            side = windows.shape[2] - weight.shape[2] + 1
            outputs = gradient.view(len(windows), side, side, -1).permute(0, 3, 1, 2)
            _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                outputs, windows, weight, None if bias is None else [len(weight)], [1, 1], [0, 0], [1, 1],
                False, [0, 0], len(weight), [False, True, bias is not None],
            )  # fmt: skip
        return grad_tokens, grad_weight, grad_bias, None


class UnitMixMLP(SegformerMixMLP):  # type: ignore[misc]  # transformers ships no types
    """The Mix-FFN, also on unit tokens alone; one of its three wide activations is computed again in backward.

    Decision: docs/decisions/0017-mix-ffn-recomputes-gelu.md.
    """

    recompute = True

    def forward(
        self, hidden_states: Tensor, height: int | None = None, width: int | None = None, halo: Halo | None = None
    ) -> Tensor:
        """Tokens (B, n, C) of maps of height × width, or unit tokens with their neighbours by `halo`: same shape."""
        wide = self.fc1(hidden_states)
        wide = self.dwconv(wide, height, width) if halo is None else self.dwconv.dwconv(wide, halo)
        activated = self.activation_fn(wide)
        dropped = self.dropout.training and self.dropout.p
        if dropped or not self.recompute or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.dropout(self.fc2(self.dropout(activated)))  # type: ignore[no-any-return]
        with _recomputed(activated, lambda: self.activation_fn(wide)):
            return self.fc2(activated)  # type: ignore[no-any-return]


def _recomputed(tensor: Tensor, again: Callable[[], Tensor]) -> saved_tensors_hooks:
    """While this is entered, autograd does not keep `tensor`; backward calls `again` to make it once more."""
    # Not the tensor itself: autograd keeps the functions below, and would keep the tensor with them.
    own = _memory(tensor), tensor.numel()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if (_memory(saved), saved.numel()) == own else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else again().view(packed)

    return saved_tensors_hooks(pack, unpack)


def _memory(tensor: Tensor) -> int:
    """What tells one piece of memory from another, also for tensors that have none (meta)."""
    address: int = tensor.untyped_storage()._cdata
    return address


def token_rows(windows: Tensor) -> Tensor:
    """(n, C, r, r) to (n · r², C); free in channels-last memory."""
    return windows.permute(0, 2, 3, 1).reshape(-1, windows.shape[1])


def _with_batch_stride(x: Tensor) -> Tensor:
    """The same maps; a batch of one in channels-last memory gets the batch stride that this layout has.

    transformers makes these maps by transposing tokens, which leaves a batch of one with a stride of C. That stride is
    never used, but with it oneDNN does not recognise the layout, and depthwise convolutions become far slower.

    Decision: docs/decisions/0017-mix-ffn-recomputes-gelu.md.
    """
    if len(x) > 1 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x
    _, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).flatten().view(1, height, width, channels).permute(0, 3, 1, 2)
