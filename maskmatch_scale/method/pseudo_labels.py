"""Pseudo-labels of the whole image from a multi-scale ensemble, as in the paper; scales and rounding are our choice.

Decision: docs/decisions/0016-bands-and-chunks.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from maskmatch_scale.models.resample import resized, upsampling_rows


@torch.no_grad()
def multi_scale_pseudo_labels(
    segmenter: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """ŷ and c of the method: argmax and max of p = mean over q of softmax(up(T(resize(u_w, q)))).

    Args:
        segmenter: the teacher, in the mode (train or eval) that the caller has put it in. Sides of resized images are
            rounded to multiples of its ``patch_px``, if it has one.
        images: float (B, 3, H, W), normalised, the weak view.
        scales: Q; a resized side is at least one patch.

    Returns:
        labels int64 (B, H, W), confidence float32 (B, H, W) in 0–1.
    """
    batch, _, height, width = images.shape
    patch_px = int(getattr(segmenter, "patch_px", 1))
    logits = [segmenter(resized(images, scale, patch_px)) for scale in scales]
    labels = torch.empty(batch, height, width, dtype=torch.int64, device=images.device)
    confidence = torch.empty_like(labels, dtype=torch.promote_types(logits[0].dtype, torch.float32))
    # In bands of rows, so that of each scale only its logits are kept, at their own resolution.
    with torch.autocast(images.device.type, enabled=False):
        for bands in zip(*(upsampling_rows(own, height, width) for own in logits), strict=True):
            total = bands[0].upsample(logits[0]).softmax(1)
            for band, own in zip(bands[1:], logits[1:], strict=True):
                total += band.upsample(own).softmax(1)
            rows = bands[0].output
            torch.max(total.div_(len(scales)), dim=1, out=(confidence[:, rows], labels[:, rows]))
    return labels, confidence
