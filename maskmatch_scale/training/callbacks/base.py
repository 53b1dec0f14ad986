"""What a callback is, and the moments at which one is called.

    started                     before the first step; the model is built, a continued run is restored
      before_step               for every step
      after_step                the step is launched; its figures are still on the device
      records_read              where a callback wants it: figures of the steps since the last time have been read
      between_steps             after the records: evaluate, save
        evaluated               a record of an evaluation has been written
      stopping                  some callback has set `run.stop_reason`, and the run stops after this step
    ended                       always, also after an error
    finished                    all steps have been taken, and the loader processes have ended

At every moment callbacks are called in the order of the list in `callbacks/__init__.py`. None knows another one: what
they share is the :class:`~maskmatch_scale.training.run.Run`. All ranks are at the same moment at the same step, so a
callback may use collectives, as long as it does so on every rank.

After OLMo-core's `train/callbacks` (https://github.com/allenai/OLMo-core).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskmatch_scale.training.run import Run
    from maskmatch_scale.training.step import StepFigures

Record = dict[str, Any]
"""A record as it stands in `metrics.jsonl`."""


class Callback:
    """Watches or interrupts a run. Every method does nothing until it is overridden.

    Args:
        run: on this rank.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def started(self) -> None:
        """The first step is about to be taken."""

    def before_step(self, step: int) -> None:
        """Step number ``step``, from 0, is about to be taken."""

    def after_step(self, done: int, figures: StepFigures) -> None:
        """The step was launched; ``done`` steps are taken. Reading a figure on the device would wait for it."""

    def wants_records(self, done: int) -> bool:
        """Whether the figures of the steps so far have to be read from the device now."""
        return False

    def records_read(self, records: Sequence[Record]) -> None:
        """Figures were read: the records of all steps since the last time, at least one, and written to the file."""

    def between_steps(self, done: int) -> None:
        """``done`` steps are taken. `run.stop_reason` says whether the run stops here."""

    def evaluated(self, record: Record) -> None:
        """The model was evaluated; ``record`` stands in `metrics.jsonl`."""

    def stopping(self, done: int) -> None:
        """The run stops after ``done`` steps, because of `run.stop_reason`."""

    def said(self, line: str) -> None:
        """Somebody has a line for whoever watches the run."""

    def ended(self) -> None:
        """No more steps will be taken, for whatever reason."""

    def finished(self) -> None:
        """All steps have been taken."""

    def state(self) -> dict[str, Any]:
        """JSON values that go into a checkpoint's `state.json`, the same on all ranks; `run.resumed` has them again."""
        return {}

    def summary(self) -> dict[str, Any]:
        """JSON values for `summary.json`, the same on all ranks."""
        return self.state()
