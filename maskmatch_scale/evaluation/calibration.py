"""Whether confidence says how often a prediction is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Reliability:
    """Pixels by their confidence: how many there are, and how many are right (Guo et al., arXiv 1706.04599).

    Args:
        threshold: τ: pixels of at least this confidence are also counted by themselves. One number, or one for each
            class, of which that of the prediction counts.
        ignore_index: label value of pixels that do not count.
        bins: bins of equal width from 0 to 1.
    """

    def __init__(self, threshold: float | Sequence[float], ignore_index: int = 255, bins: int = 20) -> None:
        self.threshold = torch.tensor(threshold, dtype=torch.float64)
        self.ignore_index, self.bins = ignore_index, bins
        self.counts = torch.zeros(3, bins, dtype=torch.float64)
        """By bin: pixels, right ones, sum of confidences."""
        self.above = torch.zeros(2, dtype=torch.int64)
        """Pixels of at least the threshold, and the right ones of them."""

    def update(self, confidence: Tensor, pred: Tensor, target: Tensor) -> None:
        """Add pixels: confidence 0–1, predicted class and label, all of one shape."""
        known = target != self.ignore_index
        confidence, right = confidence[known], (pred[known].long() == target[known].long()).double()
        threshold = self.threshold.to(confidence.dtype)
        sure = confidence >= (threshold[pred[known].long()] if threshold.ndim else threshold)
        self.above += torch.stack([sure.sum(), (right.bool() & sure).sum()])
        confidence = confidence.double()
        edges = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64)[1:-1]
        place = torch.bucketize(confidence, edges, right=True)
        for row, weights in enumerate((torch.ones_like(right), right, confidence)):
            self.counts[row] += torch.bincount(place, weights, minlength=self.bins)

    def expected_error(self) -> float:
        """Expected calibration error, 0–1: mean over pixels of |accuracy − confidence| of their bin."""
        pixels, right, confidence = self.counts
        return float((right - confidence).abs().sum() / pixels.sum())

    def table(self) -> list[dict[str, float]]:
        """Of every bin that has pixels: `from`, `pixels`, `accuracy`, `confidence`."""
        return [
            {"from": number / self.bins, "pixels": int(n), "accuracy": right / n, "confidence": confidence / n}
            for number, (n, right, confidence) in enumerate(self.counts.T.tolist())
            if n
        ]
