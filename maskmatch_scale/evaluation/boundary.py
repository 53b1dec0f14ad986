"""How well the boundaries of classes are found: boundary IoU, and mIoU of the pixels near a boundary."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from maskmatch_scale.evaluation.miou import ConfusionMatrix


def near_contour(classes: Tensor, distance_px: int, known: Tensor, *, border: bool = False) -> Tensor:
    """Pixels with a pixel of another class at most ``distance_px`` rows and columns away.

    Args:
        classes: integer (H, W).
        distance_px: at least 1.
        known: bool (H, W). Other pixels are near nothing, and are no other class.
        border: whether the outside of the image is another class.

    Returns:
        Bool (H, W).
    """
    values = classes.float()
    highest = _largest_around(values.masked_fill(~known, -torch.inf), distance_px)
    lowest = -_largest_around((-values).masked_fill(~known, -torch.inf), distance_px)
    near = highest != lowest
    if border:
        inner = torch.zeros_like(known)
        inner[distance_px : len(known) - distance_px, distance_px : known.shape[1] - distance_px] = True
        near |= ~inner
    return near & known


def _largest_around(values: Tensor, distance: int) -> Tensor:
    """Largest of the values (H, W) in the square of 2 · distance + 1 around each pixel."""
    side = 2 * distance + 1
    rows = F.max_pool2d(values[None, None], (side, 1), 1, (distance, 0))
    return F.max_pool2d(rows, (1, side), 1, (0, distance))[0, 0]


class BoundaryIou:
    """Boundary IoU (Cheng et al., CVPR 2021, arXiv 2103.16562), as IoU over the pixels of a data set.

    Of a class count the pixels of its masks that are near the masks' contours, in the label and in the prediction. As
    in the authors' code, distances are those of an erosion with a square of 3 × 3 px, and the border of the image is a
    contour. Ignored pixels of the label are ignored in the prediction too, and make no contour.

    Args:
        num_classes: number of classes.
        ignore_index: label value of pixels that do not count.
        share: distance as a share of the image's diagonal; the authors' 2 %.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, share: float = 0.02) -> None:
        self.num_classes, self.ignore_index, self.share = num_classes, ignore_index, share
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64)
        """Pixels near contours by class: common to label and prediction, of the label, of the prediction."""

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add an image: predicted classes and labels, integer (H, W)."""
        pred, target = pred.long(), target.long()
        distance = max(1, round(self.share * math.hypot(*target.shape)))
        known = target != self.ignore_index
        theirs = near_contour(target, distance, known, border=True)
        ours = near_contour(pred, distance, known, border=True)
        for row, values in enumerate((target[theirs & ours & (pred == target)], target[theirs], pred[ours])):
            self.counts[row] += torch.bincount(values, minlength=self.num_classes)

    def iou(self) -> Tensor:
        """Boundary IoU of each class: float64 (classes,), 0–1, NaN where neither label nor prediction has a contour."""
        common, label, prediction = self.counts
        found: Tensor = common.double() / (label + prediction - common).double()
        return found


class NearBoundary:
    """Confusion matrices of the pixels near a boundary between two classes of the label (Kohli et al., IJCV 2009).

    Args:
        num_classes: number of classes.
        distances_px: distances, one matrix for each; measured as for :func:`near_contour`.
        ignore_index: label value of pixels that do not count.
    """

    def __init__(self, num_classes: int, distances_px: tuple[int, ...], ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index
        self.matrices = {distance: ConfusionMatrix(num_classes, ignore_index) for distance in distances_px}

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add an image: predicted classes and labels, integer (H, W)."""
        for distance, matrix in self.matrices.items():
            near = near_contour(target, distance, target != self.ignore_index)
            matrix.update(pred[near], target[near])
