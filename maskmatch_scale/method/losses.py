"""Losses as sums over pixels; the caller divides them by the valid pixels of the global batch.

Decision: docs/decisions/0016-bands-and-chunks.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from maskmatch_scale.method.pseudo_labels import Probabilities
from maskmatch_scale.models.resample import RowBand, upsampling_rows

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
    target = target.masked_fill(~pixels, IGNORED)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    class_weight = None if class_weight is None else class_weight.to(dtype)
    weight, index = _weights(target, class_weight, dtype)
    minus = -weight

    def of_band(upsampled: Tensor, rows: slice, wanted: Tensor) -> BandSum:
        log_p = upsampled.log_softmax(1)
        total = F.nll_loss(log_p, wanted, class_weight, ignore_index=IGNORED, reduction="sum")
        # weight · (softmax − one-hot), in the memory of log_p
        return (
            total,
            lambda: log_p.exp_().mul_(weight[:, :, rows]).scatter_add_(1, index[:, :, rows], minus[:, :, rows]),
        )

    height, width = target.shape[1:]
    bands = upsampling_rows(logits, height, width)
    return sum_over_bands(logits, ((band, target[:, band.output]) for band in bands), of_band)


BandSum = tuple[Tensor, Callable[[], Tensor]]
"""A loss summed over a band of rows, and a function that gives its gradient at the upsampled logits."""


def sum_over_bands(
    logits: Tensor,
    bands: Iterable[tuple[RowBand, Tensor]],
    of_band: Callable[[Tensor, slice, Tensor], BandSum],
) -> Tensor:
    """Sum of a loss over bands of rows, of which only one is in memory; not under autocast.

    Args:
        logits: float (B, classes, h, w).
        bands: each band with its target.
        of_band: the loss of a band, given its upsampled logits (B, classes, rows, W), its rows and its target. The
            gradient is asked for at most once, after the value.

    Returns:
        Scalar, float32 (float64 for float64 logits). Differentiable once, in logits.
    """
    with torch.autocast(logits.device.type, enabled=False):
        total: Tensor = _SumOverBands.apply(logits, bands, of_band)
    return total


class _SumOverBands(torch.autograd.Function):
    """`sum_over_bands`; the gradient is computed together with the value, at the logits' own resolution."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, bands: Iterable[tuple[RowBand, Tensor]], of_band: Any) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=logits.device)
        gradient = torch.zeros_like(logits, dtype=dtype) if ctx.needs_input_grad[0] else None
        for band, target in bands:
            value, gradient_of_band = of_band(band.upsample(logits), band.output, target)
            total += value
            if gradient is not None:
                band.add_gradient(gradient_of_band(), gradient)
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

    def of_band(upsampled: Tensor, rows: slice, wanted: Tensor) -> BandSum:
        p = upsampled.softmax(1)
        error = (p - wanted).mul_(pixels[:, None, rows])
        # Through the softmax: 2 p (error - Σ over classes of p · error)
        return error.square().sum(), lambda: error.sub_((p * error).sum(1, keepdim=True)).mul_(p).mul_(2)

    return sum_over_bands(logits, target.bands_of(logits), of_band)
