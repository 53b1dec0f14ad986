"""Masked passes without the context decoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.ablation.variants.base import Variant
from maskmatch_scale.models.units import Grid
from maskmatch_scale.training.run import Run


class ContextOff(Variant):
    """Features of masked units are zero, as without a context decoder (`Segmenter.decode`).

    It is not computed. Its parameters stay where the optimizer and checkpoints look for them, with gradients of zero.
    """

    def __init__(self, run: Run, steps: int) -> None:
        super().__init__(run, steps)
        context = run.student.context
        assert context is not None, "this student has no context decoder"

        def zeros(features: Sequence[Tensor], visible: Tensor, grid: Grid) -> list[Tensor]:
            masked = grid[0] * grid[1] - visible.shape[1]
            return [level.new_zeros(len(level), masked, *level.shape[2:]) for level in features]

        context.forward = zeros  # type: ignore[method-assign]
