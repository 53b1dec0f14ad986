"""What a person sees of a run: a bar on a terminal, lines in a file, nothing of ranks other than 0."""

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
        """Steps of the burn-in are cheaper: where it ends, the time a step is counted anew."""
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
        """Take the bar away, so that an error's message stands alone."""
        self._bar.__exit__(None, None, None)
