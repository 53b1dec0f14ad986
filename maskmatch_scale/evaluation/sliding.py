"""Sliding-window prediction of images larger than a training crop."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def window_starts(side: int, window: int, overlap: float) -> list[int]:
    """First rows (or columns) of windows that are evenly spread and cover ``side`` px.

    Args:
        side: side of the image, px. If it is less than ``window``, one window covers it.
        window: side of a window, px.
        overlap: smallest share by which neighbouring windows overlap, 0 ≤ overlap < 1.
    """
    if side <= window:
        return [0]
    count = math.ceil((side - window) / (window * (1 - overlap))) + 1
    return [round(i * (side - window) / (count - 1)) for i in range(count)]


@torch.no_grad()
def sliding_probabilities(
    segmenter: Callable[[Tensor], Tensor], image: Tensor, window_px: tuple[int, int], overlap: float, batch: int
) -> Tensor:
    """Class probabilities of a whole image: a softmax for each window, averaged where windows overlap.

    Args:
        segmenter: normalised images (B, 3, h, w) to logits.
        image: float (3, H, W), normalised. If it is smaller than a window, it is padded with zeros, the mean colour.
        window_px: (h, w), usually the training crop.
        overlap: smallest share by which neighbouring windows overlap.
        batch: number of windows in one forward.

    Returns:
        float32 (classes, H, W).
    """
    height, width = image.shape[-2:]
    rows, columns = window_px
    padded = F.pad(image, (0, max(0, columns - width), 0, max(0, rows - height)))
    corners = [
        (top, left)
        for top in window_starts(padded.shape[-2], rows, overlap)
        for left in window_starts(padded.shape[-1], columns, overlap)
    ]
    total: Tensor | None = None
    for first in range(0, len(corners), batch):
        some = corners[first : first + batch]
        windows = torch.stack([padded[:, top : top + rows, left : left + columns] for top, left in some])
        logits = segmenter(windows)
        scores = F.interpolate(logits.float(), size=window_px, mode="bilinear", align_corners=False).softmax(1)
        if total is None:
            total = scores.new_zeros(scores.shape[1], *padded.shape[-2:])
        for score, (top, left) in zip(scores, some, strict=True):
            total[:, top : top + rows, left : left + columns] += score
    assert total is not None
    # Dividing by the number of windows over a pixel is the same as normalising its probabilities to sum 1.
    total = total[:, :height, :width]
    return total / total.sum(0, keepdim=True)


def forwards_of(size_px: tuple[int, int], window_px: tuple[int, int], overlap: float, batch: int) -> int:
    """Number of forwards that :func:`sliding_probabilities` runs for an image of ``size_px`` (height, width)."""
    windows = math.prod(len(window_starts(max(s, w), w, overlap)) for s, w in zip(size_px, window_px, strict=True))
    return math.ceil(windows / batch)
