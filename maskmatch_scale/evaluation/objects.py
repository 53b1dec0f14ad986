"""Recall of small objects: connected pixels of one class in the label."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL_PX = 32 * 32
"""Objects with less pixels are small: COCO's bound."""


def components(classes: Tensor) -> Tensor:
    """Number the connected components of a label map.

    Args:
        classes: integer (H, W).

    Returns:
        int64 (H, W): the same number for pixels that a path of neighbours (8 a pixel) of the same class connects. It is
        the place of one of them in the flattened map.
    """
    height, width = classes.shape
    place = torch.arange(height * width, device=classes.device).view(height, width)
    pairs = []
    for rows, left, right in ((0, 0, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0)):  # right, below, and the two diagonals
        one = slice(None, height - rows), slice(left, width - right if right else None)
        other = slice(rows, None), slice(right, width - left if left else None)
        same = classes[one] == classes[other]
        pairs.append(torch.stack([place[one][same], place[other][same]]))
    edges, parent = torch.cat(pairs, 1), place.flatten().clone()
    while True:
        roots = parent[edges]
        roots = roots[:, roots[0] != roots[1]]
        if not roots.numel():
            return parent.view(height, width)
        parent.scatter_reduce_(0, roots.amax(0), roots.amin(0), "amin")  # a root gets a lower one as its parent
        while not (above := parent[parent]).equal(parent):
            parent = above


class SmallObjects:
    """How many small objects are found: at least half of their pixels have their class in the prediction.

    Args:
        num_classes: number of classes.
        ignore_index: label value of pixels that belong to no object.
        below_px: pixels from which on an object is not small.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, below_px: int = SMALL_PX) -> None:
        self.num_classes, self.ignore_index, self.below_px = num_classes, ignore_index, below_px
        self.counts = torch.zeros(2, num_classes, dtype=torch.int64)
        """By class: small objects, and those of them that were found."""

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add an image: predicted classes and labels, integer (H, W)."""
        number, target = components(target).flatten(), target.long().flatten()
        known = target != self.ignore_index
        pixels = torch.bincount(number[known], minlength=target.numel())
        hits = torch.bincount(number[known & (pred.long().flatten() == target)], minlength=target.numel())
        small = (pixels > 0) & (pixels < self.below_px)
        # The number of a component is the place of one of its pixels.
        for row, chosen in enumerate((small, small & (2 * hits >= pixels))):
            self.counts[row] += torch.bincount(target[chosen], minlength=self.num_classes)

    def recall(self) -> Tensor:
        """Share of small objects that were found, of each class: float64 (classes,), NaN for a class without any."""
        return self.counts[1].double() / self.counts[0].double()
