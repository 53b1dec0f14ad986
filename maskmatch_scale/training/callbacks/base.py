"""The base class of callbacks, and when its methods are called.

    started                     before the first step; the model is built, a continued run is restored
      before_step               before every step
      after_step                after every step was launched; its figures are still on the device
      records_read              if any callback wants records, or the run stops: the figures of the steps since the last
                                time are read
      between_steps             after every step and after records_read: evaluate, save
        evaluated               a record of an evaluation has been written
      stopping                  all ranks know that the run stops after this step (`run.stopping`)
    ended                       after the last step, also after an error
    finished                    all steps have been taken, or the run has ended early (`run.end`), and the loader
                                processes have ended

Each method is called for all callbacks in the order of the list in `callbacks/__init__.py`, before the next method is
called. Callbacks do not know each other; they share the :class:`~maskmatch_scale.training.run.Run`. All ranks call the
same method at the same step, so a callback may use collectives if it does so on every rank. A callback of any rank may
ask for an end: `run.ask_to_stop` (`training/agreement.py`).

The design follows OLMo-core's `train/callbacks` (https://github.com/allenai/OLMo-core).

Decision: docs/decisions/0033-callbacks-watch-the-run.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskmatch_scale.training.run import Run
    from maskmatch_scale.training.step import StepFigures

Record = dict[str, Any]
"""A record, as in `metrics.jsonl`."""


class Callback:
    """Watches or interrupts a run. Its methods do nothing unless a subclass overrides them.

    Args:
        run: on this rank.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def started(self) -> None:
        """The first step is about to be taken."""

    def before_step(self, step: int) -> None:
        """Step ``step`` (from 0) is about to be taken."""

    def after_step(self, done: int, figures: StepFigures) -> None:
        """A step was launched; ``done`` steps are taken. Reading a figure on the device would wait for it."""

    def wants_records(self, done: int) -> bool:
        """Whether the figures of the steps so far must be read from the device now."""
        return False

    def records_read(self, records: Sequence[Record]) -> None:
        """Figures were read and written to the file: ``records`` has all steps since the last time, at least one."""

    def between_steps(self, done: int) -> None:
        """``done`` steps are taken. If `run.stopping` is set, the run stops after this."""

    def evaluated(self, record: Record) -> None:
        """The model was evaluated; ``record`` stands in `metrics.jsonl`."""

    def stopping(self, done: int) -> None:
        """The run stops after ``done`` steps, for the reason in `run.stopping`."""

    def said(self, line: str) -> None:
        """A line for people who watch the run (:meth:`Run.say`)."""

    def ended(self) -> None:
        """No more steps will be taken, be it after the last step or after an error."""

    def finished(self) -> None:
        """All steps have been taken, or the run has ended early."""

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint's `state.json`, the same on all ranks.

        A run that continues from the checkpoint has them in `run.resumed`.
        """
        return {}

    def summary(self) -> dict[str, Any]:
        """JSON values for `summary.json`, the same on all ranks."""
        return self.state()

    def is_due(self, done: int, every: int) -> bool:
        """Whether ``done`` is the last step, or a multiple of ``every`` (0: only the last step)."""
        return done == self.run.end or bool(every and done % every == 0)
