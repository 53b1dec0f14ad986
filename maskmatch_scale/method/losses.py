"""Losses as sums over pixels; the caller divides them by the valid pixels of the global batch.

Decision: docs/decisions/0016-bands-and-chunks.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from maskmatch_scale.method.pseudo_labels import Probabilities
from maskmatch_scale.models.resample import upsampling_rows

IGNORED = -100
"""The target value of pixels that do not count: the default `ignore_index` of torch's losses."""


def cross_entropy_sum(logits: Tensor, target: Tensor, pixels: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Σ over pixels of CE(up(logits), target): L_x, L_u and L_m of docs/method.md before their division.

    Logits are upsampled and the loss is taken in bands of rows, so that memory does not grow with classes × H × W. The
    gradient is that of the plain formula. It is computed together with the value, while a band lies in the cache, and
    kept at the logits' own resolution, as in Liger Kernel's fused losses (arXiv 2410.10989).

    Args:
        logits: float (B, classes, h, w), upsampled bilinearly (align_corners=False) to the target's size.
        target: int64 (B, H, W); its value does not matter where ``pixels`` is False.
        pixels: bool (B, H, W): the pixels that count.
        class_weight: float (classes,), or None.

    Returns:
        Scalar, float32 (float64 for float64 logits). Differentiable once, in logits.
    """
    with torch.autocast(logits.device.type, enabled=False):
        total: Tensor = _CrossEntropySum.apply(logits, target.masked_fill(~pixels, IGNORED), class_weight)
    return total


class _CrossEntropySum(torch.autograd.Function):
    """`cross_entropy_sum` with the pixels that do not count marked in the target."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, class_weight: Tensor | None) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        class_weight = None if class_weight is None else class_weight.to(dtype)
        total = torch.zeros((), dtype=dtype, device=logits.device)
        gradient = torch.zeros_like(logits, dtype=dtype) if ctx.needs_input_grad[0] else None
        weight, index = _weights(target, class_weight, dtype)
        minus = -weight
        for band in upsampling_rows(logits, target.shape[1], target.shape[2]):
            wanted = target[:, band.output]
            log_p = band.upsample(logits).log_softmax(1)
            total += F.nll_loss(log_p, wanted, class_weight, ignore_index=IGNORED, reduction="sum")
            if gradient is not None:
                # weight · (softmax − one-hot), in the memory of log_p
                own, which, less = weight[:, :, band.output], index[:, :, band.output], minus[:, :, band.output]
                band.add_gradient(log_p.exp_().mul_(own).scatter_add_(1, which, less), gradient)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * scale).to(ctx.dtype), None, None


def _weights(target: Tensor, class_weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight of each pixel, 0 where the target is ignored, and its class, 0 there: both (B, 1, H, W)."""
    counts = target != IGNORED
    index = target.masked_fill(~counts, 0)[:, None]
    weight = counts[:, None].to(dtype)
    return (weight if class_weight is None else weight * class_weight[index]), index


def denominator(target: Tensor, pixels: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """What the sum is divided by: the number of pixels that count, or the sum of their weights.

    Args:
        target: int64 (B, H, W), as in `cross_entropy_sum`.
        pixels: bool (B, H, W): the pixels that count.
        class_weight: float (classes,), or None.

    Returns:
        float64 scalar.
    """
    if class_weight is None:
        return pixels.sum().double()
    return class_weight.double()[target.masked_fill(~pixels, 0)].mul(pixels).sum()


def squared_error_sum(logits: Tensor, target: Probabilities, pixels: Tensor) -> Tensor:
    """Σ over pixels of ‖softmax(up(logits)) - target‖², the square summed over classes.

    In bands of rows and with the gradient computed at once, as `cross_entropy_sum`.

    Args:
        logits: float (B, classes, h, w), upsampled bilinearly (align_corners=False) to the target's size.
        target: of the same images and classes.
        pixels: bool (B, H, W): the pixels that count.

    Returns:
        Scalar, float32 (float64 for float64 logits). Differentiable once, in logits.
    """
    with torch.autocast(logits.device.type, enabled=False):
        total: Tensor = _SquaredErrorSum.apply(logits, target, pixels)
    return total


class _SquaredErrorSum(torch.autograd.Function):
    """`squared_error_sum`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Probabilities, pixels: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=logits.device)
        gradient = torch.zeros_like(logits, dtype=dtype) if ctx.needs_input_grad[0] else None
        own = upsampling_rows(logits, *target.size_px, target.images_in_band)
        for band, (rows, wanted) in zip(own, target.bands(), strict=True):
            p = band.upsample(logits).softmax(1)
            error = (p - wanted).mul_(pixels[:, None, rows])
            total += error.square().sum()
            if gradient is not None:
                # Through the softmax: 2 p (error - Σ over classes of p · error)
                error -= (p * error).sum(1, keepdim=True)
                band.add_gradient(error.mul_(p).mul_(2), gradient)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * scale).to(ctx.dtype), None, None
