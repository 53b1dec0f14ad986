"""Weights and τ that change with the step."""

from __future__ import annotations

from typing import ClassVar

from benchmarks.ablation.variants.base import Variant
from maskmatch_scale.training.run import Run


class LambdaRamp(Variant):
    """λ_u and λ_m rise linearly from 0 over the first half of the steps after the burn-in."""

    def before_step(self, step: int) -> None:
        """Set both."""
        method, share = self.run.recipe.method, self.share(step, 0.5)
        # Filled with numbers of the host: nothing waits for the device.
        for part, weight in ((1, method.unlabelled_weight), (2, method.mask.weight)):
            self.run.maskmatch.part_weights[part].fill_(share * weight)


class ThresholdRamp(Variant):
    """τ goes linearly from `start` to the recipe's, over all steps after the burn-in."""

    start: ClassVar[float] = 0.5

    def __init__(self, run: Run, steps: int) -> None:
        super().__init__(run, steps)
        self._end = run.maskmatch.threshold

    def before_step(self, step: int) -> None:
        """Set τ."""
        share = self.share(step, 1.0)
        self.run.maskmatch.threshold = (1 - share) * self.start + share * self._end


class ThresholdDown(ThresholdRamp):
    """The same from above."""

    start = 0.99
