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

from maskmatch_scale.models.units import Halo, with_zero_row


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


class TableLinear(nn.Linear):
    """A linear layer that can leave room for a zero row after its output, so that a `Halo` gathers without a copy."""

    def forward(self, x: Tensor, table: bool = False) -> Any:
        """(…, C) to (…, C_out).

        With `table`, tokens (B, n, C) give two results: tokens (B · n, C_out), and the table (B · n + 1, C_out) that
        they are the first rows of and whose last row is zero. The table has no gradient.
        """
        if not table:
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            # Autocast does not cast what a function with a backward of its own computes.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _LinearTable.apply(x.flatten(0, 1), self.weight, self.bias)


class _LinearTable(torch.autograd.Function):
    """`TableLinear` of rows (n, C): the same products in the same order as those of `F.linear` and its backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        # The parameter itself: a 16-bit copy would keep it whole until backward at ZeRO-3.
        ctx.save_for_backward(rows, weight)
        ctx.set_materialize_grads(False)  # else autograd makes zeros for the table, which has no gradient
        table = rows.new_empty(len(rows) + 1, len(weight))
        torch.addmm(bias.to(rows.dtype), rows, weight.to(rows.dtype).T, out=table[:-1])
        table[-1:].zero_()
        ctx.mark_non_differentiable(table)
        return table[:-1], table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            gradient @ weight.to(gradient.dtype) if needs_rows else None,
            (gradient.T @ rows).to(weight.dtype) if needs_weight else None,
            gradient.sum(0).to(weight.dtype) if needs_bias else None,
        )


class HaloConv2d(nn.Conv2d):
    """A depthwise convolution that also runs on unit tokens alone. `PatchConv2d` says why it is called as a module."""

    def forward(self, x: Tensor, halo: Halo | None = None, table: Tensor | None = None, gelu: bool = False) -> Any:
        """Convolve maps (B, C, h, w), or unit tokens (B · k · r², C) with their neighbours by `halo`.

        Args:
            x: maps or unit tokens.
            halo: where neighbours of unit tokens lie; None: x is maps.
            table: unit tokens and a zero row after them, for `Halo.windows`.
            gelu: also apply GELU to what unit tokens give. The result is then a pair: activated tokens, and the
                convolution's own output, which has no gradient.
        """
        if halo is None or table is None:
            return super().forward(_with_batch_stride(x))
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        mixed, activated = _HaloDepthwise.apply(x, table, weight, bias, halo.index, gelu)
        return (activated, mixed) if gelu else mixed


class _HaloDepthwise(torch.autograd.Function):
    """Depthwise convolution of unit tokens (B · k · r², C), masked neighbours and the outside read as zero.

    With stride 1 and an odd kernel, the gradient of the input is the same convolution of the gradient with the kernel
    turned round. So backward gathers with the same plan instead of scattering, and sums in a fixed order. Only the
    tokens are kept for it; the windows are up to nine times larger.

    GELU belongs to it because its gradient is what backward gathers: it is written into a table right away.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, table: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, gelu: bool
    ) -> tuple[Tensor, Tensor | None]:
        mixed = token_rows(F.conv2d(Halo(index).windows(table), weight, bias, groups=len(weight)))
        ctx.save_for_backward(table, weight, bias, index, mixed if gelu else None)
        ctx.set_materialize_grads(False)  # else autograd makes zeros for `mixed` where it has no gradient
        if not gelu:
            return mixed, None
        ctx.mark_non_differentiable(mixed)
        return mixed, F.gelu(mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mixed: Tensor | None, of_activated: Tensor | None) -> tuple[Tensor | None, ...]:
        table, weight, bias, index, mixed = ctx.saved_tensors
        halo = Halo(index)
        if mixed is None:
            assert of_mixed is not None
            gradient_table = with_zero_row(of_mixed)
        else:
            gradient_table = torch.empty_like(table)
            torch.ops.aten.gelu_backward.grad_input(of_activated, mixed, grad_input=gradient_table[:-1])
            gradient_table[-1:].zero_()
        grad_tokens = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            turned = F.conv2d(halo.windows(gradient_table), weight.flip(2, 3), groups=len(weight))
            grad_tokens = token_rows(turned)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            windows = halo.windows(table)
            side = windows.shape[2] - weight.shape[2] + 1
            outputs = gradient_table[:-1].view(len(windows), side, side, -1).permute(0, 3, 1, 2)
            _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                outputs, windows, weight, None if bias is None else [len(weight)], [1, 1], [0, 0], [1, 1],
                False, [0, 0], len(weight), [False, True, bias is not None],
            )  # fmt: skip
        return grad_tokens, None, grad_weight, grad_bias, None, None


class UnitMixMLP(SegformerMixMLP):  # type: ignore[misc]  # transformers ships no types
    """The Mix-FFN, also on unit tokens alone; one of its three wide activations is computed again in backward.

    Decision: docs/decisions/0017-mix-ffn-recomputes-gelu.md.
    """

    recompute = True

    def forward(
        self, hidden_states: Tensor, height: int | None = None, width: int | None = None, halo: Halo | None = None
    ) -> Tensor:
        """Tokens (B, n, C) of maps of height × width, or unit tokens with their neighbours by `halo`: same shape."""
        if halo is None:
            wide = self.dwconv(self.fc1(hidden_states), height, width)
            activated = self.activation_fn(wide)
        else:
            wide, activated = self._unit_activation(hidden_states, halo)
        dropped = self.dropout.training and self.dropout.p
        if dropped or not self.recompute or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.dropout(self.fc2(self.dropout(activated)))  # type: ignore[no-any-return]
        with _recomputed(activated, lambda: self.activation_fn(wide)):
            return self.fc2(activated)  # type: ignore[no-any-return]

    def _unit_activation(self, tokens: Tensor, halo: Halo) -> tuple[Tensor, Tensor]:
        """Of unit tokens (B, n, C): what the convolution gives and what the activation makes of it, (B, n, C_wide)."""
        wide, table = self.fc1(tokens, table=True)
        gelu = getattr(self.activation_fn, "act", None) is F.gelu
        if gelu:
            activated, mixed = self.dwconv.dwconv(wide, halo, table, gelu=True)
        else:
            mixed = self.dwconv.dwconv(wide, halo, table)
            activated = self.activation_fn(mixed)
        return mixed.view(*tokens.shape[:2], -1), activated.view(*tokens.shape[:2], -1)


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
    if x.shape[0] > 1 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x
    _, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).flatten().view(1, height, width, channels).permute(0, 3, 1, 2)
