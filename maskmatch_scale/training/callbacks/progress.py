"""The progress that rank 0 shows: a bar on a terminal, or lines in a file."""

from __future__ import annotations

from collections.abc import Sequence

from maskmatch_scale.record.progress import TrainingProgress
from maskmatch_scale.training.callbacks.base import Callback, Record
from maskmatch_scale.training.run import Run
from maskmatch_scale.training.step import StepFigures


class Progress(Callback):
    """Drives the bar of `record/progress.py`."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._bar = TrainingProgress(run.recipe.run.steps, run.start, shown=run.runtime.rank == 0)

    def started(self) -> None:
        """Show the bar."""
        self._bar.__enter__()

    def before_step(self, step: int) -> None:
        """Tell the bar when the burn-in ends: its steps take less time, so the time left is then estimated anew."""
        self._bar.phase(cheap=step < self.run.recipe.burn_in_steps)

    def after_step(self, done: int, figures: StepFigures) -> None:
        """Move the bar."""
        self._bar.step(done)

    def records_read(self, records: Sequence[Record]) -> None:
        """Show the newest figures."""
        self._bar.figures(records[-1])

    def said(self, line: str) -> None:
        """Show a line above the bar."""
        self._bar.say(line)

    def ended(self) -> None:
        """Stop the bar before an error message is printed."""
        self._bar.__exit__(None, None, None)
