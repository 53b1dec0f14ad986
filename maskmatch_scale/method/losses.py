"""Losses as sums over pixels; who calls divides by the valid pixels of the global batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""torch's own mark for a pixel that does not count."""


def cross_entropy_sum(logits: Tensor, target: Tensor, pixels: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Σ over pixels of CE(up(logits), target), L_x, L_u and L_m of docs/method.md before their division.

    Args:
        logits: float (B, classes, h, w), upsampled bilinearly to the target's size.
        target: int64 (B, H, W); its value does not matter where ``pixels`` is False.
        pixels: bool (B, H, W): the pixels that count.
        class_weight: float (classes,), or None.

    Returns:
        float32 scalar.
    """
    logits = at_least_float32(upsample(logits, (target.shape[-2], target.shape[-1])))
    target = target.masked_fill(~pixels, IGNORED)
    return F.cross_entropy(logits, target, class_weight, ignore_index=IGNORED, reduction="sum")


def upsample(logits: Tensor, size_px: tuple[int, int]) -> Tensor:
    """Bilinear, align_corners=False, as mmsegmentation and transformers; nothing if the size is right already."""
    if logits.shape[-2:] == size_px:
        return logits
    return F.interpolate(logits, size=size_px, mode="bilinear", align_corners=False)


def denominator(target: Tensor, pixels: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """What the sum is divided by: the pixels that count, or their weights (torch's weighted mean). float64 scalar."""
    if class_weight is None:
        return pixels.sum().double()
    return class_weight.double()[target.masked_fill(~pixels, 0)].mul(pixels).sum()


def at_least_float32(values: Tensor) -> Tensor:
    """bfloat16 and float16 to float32; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
