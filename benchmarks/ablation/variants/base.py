"""The base class of variants."""

from __future__ import annotations

from typing import ClassVar

from maskmatch_scale.training.callbacks import Callback
from maskmatch_scale.training.run import Run

STATE = "variant"
"""Key of a variant's state in a checkpoint."""


class Variant(Callback):
    """Changes a run.

    Args:
        run: built, before its first step.
        steps: S of the grid, by which ramps go: a run at equal cost may be longer.
    """

    period: ClassVar[int] = 1
    """Steps after which their costs repeat."""

    def __init__(self, run: Run, steps: int) -> None:
        super().__init__(run)
        self.first = run.recipe.burn_in_steps
        """Number of the first step with unlabelled images."""
        self.steps = steps

    def share(self, step: int, of: float) -> float:
        """How far a ramp is at a step: 0 at the first step after the burn-in, 1 when a share of the rest is over.

        Args:
            step: number of the step, from 0.
            of: share of the S steps without their burn-in, 0–1.
        """
        return min(1.0, max(0.0, (step - self.first) / max(1.0, of * (self.steps - self.first))))
