"""Pseudo-labels of the whole image from a multi-scale ensemble (the paper; scales and rounding are our choice)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from maskmatch_scale.method.losses import at_least_float32, upsample


@torch.no_grad()
def multi_scale_pseudo_labels(
    segmenter: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """ŷ and c of the method: argmax and max of p = mean over q of softmax(up(T(resize(u_w, q)))).

    Args:
        segmenter: the teacher, in the mode (train or eval) its owner has put it in. Its ``patch_px``, if it has one, is
            what sides are rounded to.
        images: float (B, 3, H, W), normalised, the weak view.
        scales: Q; sides of a resized image are whole patches, at least one.

    Returns:
        labels int64 (B, H, W), confidence float32 (B, H, W) in 0–1.
    """
    size = (images.shape[-2], images.shape[-1])
    patch_px = int(getattr(segmenter, "patch_px", 1))
    total: Tensor | None = None
    for scale in scales:
        probability = upsample(segmenter(_resize(images, scale, patch_px)), size)
        probability = at_least_float32(probability).softmax(1)
        total = probability if total is None else total.add_(probability)
    assert total is not None
    confidence, labels = total.div_(len(scales)).max(dim=1)
    return labels, confidence


def _resize(images: Tensor, scale: float, patch_px: int) -> Tensor:
    """Images resized bilinearly by a factor, sides rounded to whole patches."""
    if scale == 1:
        return images
    rows, columns = (max(patch_px, round(side * scale / patch_px) * patch_px) for side in images.shape[-2:])
    return F.interpolate(images, size=(rows, columns), mode="bilinear", align_corners=False)
