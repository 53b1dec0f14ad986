"""τ of each class by how sure the teacher is of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.ablation.variants.base import STATE, Variant
from maskmatch_scale.method.bases import PseudoLabels
from maskmatch_scale.method.bases.fixmatch import FixMatch
from maskmatch_scale.method.maskmatch import Step
from maskmatch_scale.method.pseudo_labels import Probabilities
from maskmatch_scale.training.run import Run


class _FixMatchWithProbabilities(FixMatch):
    needs_probabilities = True


class ThresholdByClass(Variant):
    """τ_c = τ · p̃_c / max p̃, p̃_c being the mean confidence of the pixels that are predicted as c.

    FreeMatch's rule (Wang et al., ICLR 2023, arXiv 2205.07246) with the recipe's τ in place of its global one, as in
    FlexMatch (arXiv 2110.08263), and with another p̃: theirs is the mean probability of c, which in a segmentation is
    above all the area of c. Classes that were not predicted yet keep τ.

    Means decay as the teacher does (`method.ema_decay`; both 0.999 in Microsoft's USB, `freematch/utils.py`), and are
    plain at first, where theirs begin at 1. There a batch counts for its own labels already; here for those of the next
    step.
    """

    def __init__(self, run: Run, steps: int) -> None:
        super().__init__(run, steps)
        maskmatch, before = run.maskmatch, run.resumed.get(STATE)
        self._top = maskmatch.threshold
        self._classes = torch.arange(run.student.num_classes, device=run.runtime.device).view(1, -1, 1, 1)
        zeros = [0.0] * run.student.num_classes
        content = before or {"levels": zeros, "updates": zeros, "confidence": 0.0}
        self.levels, self.updates, self.confidence = (
            torch.tensor(content[name], dtype=torch.float64, device=run.runtime.device)
            for name in ("levels", "updates", "confidence")
        )
        if before:
            maskmatch.threshold = self.thresholds()
        assert type(maskmatch.base) is FixMatch, "probabilities are kept for this base alone"
        maskmatch.base = _FixMatchWithProbabilities()
        self._label = maskmatch.pseudo_label
        maskmatch.pseudo_label = self._label_and_learn  # type: ignore[method-assign]

    def thresholds(self) -> Tensor:
        """τ by the means so far: float64 (classes,)."""
        ratio = torch.where(self.updates > 0, self.levels / self.levels.max(), 1.0)
        thresholds: Tensor = ratio * self._top
        return thresholds

    def learn(self, probabilities: Probabilities, valid: Tensor) -> None:
        """Add a batch to the means.

        Args:
            probabilities: of the weak view, not mixed.
            valid: bool (U, H, W).
        """
        pixels, confidence, mass = torch.zeros(3, len(self.levels), dtype=torch.float64, device=valid.device)
        for rows, p in probabilities.bands():
            counted = valid[:, None, rows]
            sure, label = p.max(1, keepdim=True)
            mine = (label == self._classes) & counted
            pixels += mine.sum((0, 2, 3))
            confidence += (mine * sure).sum((0, 2, 3), dtype=torch.float64)
            mass += (p * counted).sum((0, 2, 3), dtype=torch.float64)
        self.take(pixels, confidence, mass)

    def take(self, pixels: Tensor, confidence: Tensor, mass: Tensor) -> None:
        """Add a batch by its sums.

        Args:
            pixels: float64 (classes,): how many are predicted as each class.
            confidence: float64 (classes,): sum of their confidences.
            mass: float64 (classes,): sum of all pixels' probabilities.
        """
        self._add(confidence / pixels.clamp(min=1), pixels > 0)

    def _add(self, levels: Tensor, seen: Tensor) -> Tensor:
        """Move the means of the classes that were seen, and give the decays: (classes,) all of them."""
        self.updates = self.updates + seen
        decay = (1 - 1 / self.updates.clamp(min=1)).clamp(max=self.run.recipe.method.ema_decay)
        self.levels = torch.where(seen, decay * self.levels + (1 - decay) * levels, self.levels)
        return decay

    def _label_and_learn(self, step: Step, *teacher: Any, **normalise: Any) -> PseudoLabels | None:
        pseudo = self._label(step, *teacher, **normalise)
        if pseudo is not None and step.unlabelled is not None:
            assert pseudo.probabilities is not None
            self.learn(pseudo.probabilities, step.unlabelled.weak.valid)
            self.run.maskmatch.threshold = self.thresholds()
        return pseudo

    def state(self) -> dict[str, Any]:
        """The means; they are read from the device, for a checkpoint."""
        names = ("levels", "updates", "confidence")
        return {STATE: {name: getattr(self, name).tolist() for name in names}}


class FreeMatch(ThresholdByClass):
    """τ_c = τ_t · p̃_c / max p̃: p̃ is the mean probability, τ_t the mean confidence of all pixels.

    The recipe's τ counts in the first step after the burn-in alone. Without FreeMatch's fairness loss.
    """

    def thresholds(self) -> Tensor:
        """See `ThresholdByClass`."""
        return torch.where(self.updates > 0, self.confidence * self.levels / self.levels.max(), self._top)

    def take(self, pixels: Tensor, confidence: Tensor, mass: Tensor) -> None:
        """See `ThresholdByClass`."""
        count = pixels.sum()
        decay = self._add(mass / count.clamp(min=1), (count > 0).expand_as(pixels))[0]
        mean = decay * self.confidence + (1 - decay) * confidence.sum() / count.clamp(min=1)
        self.confidence = torch.where(count > 0, mean, self.confidence)
