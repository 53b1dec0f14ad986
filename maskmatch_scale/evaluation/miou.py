"""Mean intersection over union from one global confusion matrix, at the label's own resolution."""

from __future__ import annotations

import torch
from torch import Tensor


class ConfusionMatrix:
    """Counts of (label, prediction) over every pixel of a data set.

    Args:
        num_classes: number of classes; a label of this or more, other than ``ignore_index``, is an error.
        ignore_index: label value of pixels that do not count.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        """int64 (classes, classes): rows are labels, columns predictions. Sum it over ranks before reading a figure."""

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add predictions.

        Args:
            pred: predicted classes, integer, any shape.
            target: labels, integer, the same shape.

        Raises:
            ValueError: shapes differ, or a value is outside the classes.
        """
        if pred.shape != target.shape:
            raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} differ in shape")
        known = target != self.ignore_index
        pred, target = pred[known].long(), target[known].long()
        for name, values in (("pred", pred), ("target", target)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
                raise ValueError(f"{name} has values outside 0 … {self.num_classes - 1}")
        pairs = torch.bincount(target * self.num_classes + pred, minlength=self.num_classes**2)
        self.counts += pairs.view(self.num_classes, self.num_classes).to(self.counts.device)

    def iou(self) -> Tensor:
        """IoU of each class: float64 (classes,), 0–1, NaN for a class that neither labels nor predictions contain."""
        hit = self.counts.diagonal().double()
        union = self.counts.sum(0) + self.counts.sum(1) - self.counts.diagonal()
        return hit / union.double()

    def miou(self) -> float:
        """Mean IoU, 0–1, over the classes that labels or predictions contain; NaN if nothing was counted."""
        return float(self.iou().nanmean())

    def pixel_accuracy(self) -> float:
        """Share of pixels whose class was predicted correctly, 0–1; NaN if nothing was counted."""
        return float(self.counts.diagonal().sum().double() / self.counts.sum().double())
