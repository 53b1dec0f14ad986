"""Stops the run in time for `run.max_hours`, so that its last checkpoint is complete when a scheduler ends the job."""

from __future__ import annotations

import threading
import time
from datetime import datetime, timedelta
from typing import Any

from maskmatch_scale.engine.processes import Process
from maskmatch_scale.errors import RESUMABLE
from maskmatch_scale.training.callbacks.base import Callback
from maskmatch_scale.training.run import Run
from maskmatch_scale.training.step import StepFigures

_UNKNOWN_S = 120.0
"""Assumed time of a checkpoint while none was written, but no more than a tenth of the limit."""
_TIMES = 1.5
"""How much longer than any before a checkpoint may take."""
_LOOK_S = 10.0
_STEPS = 4
"""Until all ranks know (`agreement.READ_AFTER`), and the step that is under way."""


class TimeLimit(Callback):
    """Asks to stop when what is left is just enough for a few steps and a checkpoint; idle if the recipe sets no limit.

    A thread of each rank asks, so that a long evaluation is broken off in time too.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._limit_s = 3600 * run.recipe.run.max_hours
        self._save_s = float(run.resumed.get("save_s", 0.0))
        self._step_s = 0.0
        self._stepped = time.monotonic()
        self._ended = threading.Event()

    def started(self) -> None:
        """Say when the run will stop, and start the thread."""
        if not self._limit_s:
            return
        self._over = time.monotonic() + self._limit_s - Process.own().age_s
        at = datetime.now().astimezone() + timedelta(seconds=self._over - time.monotonic())
        self.run.say(
            f"this start ends with a checkpoint before {at:%Y-%m-%d %H:%M:%S %Z}: "
            f"run.max_hours={self.run.recipe.run.max_hours:g}"
        )
        threading.Thread(target=self._wait, name="time-limit", daemon=True).start()

    def before_step(self, step: int) -> None:
        """A step begins."""
        self._stepped = time.monotonic()

    def after_step(self, done: int, figures: StepFigures) -> None:
        """Measure the step as the host sees it, without what happens between steps."""
        self._step_s = max(self._step_s * 0.9, time.monotonic() - self._stepped)  # the first ones take longer

    def ended(self) -> None:
        """End the thread."""
        self._ended.set()

    def state(self) -> dict[str, Any]:
        """The longest time of a checkpoint on any rank, in seconds, for the margin after a restart."""
        return {"save_s": self.run.runtime.max_over_ranks(round(1000 * self._longest_save_s()))() / 1000}

    def summary(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def _longest_save_s(self) -> float:
        return max(self._save_s, self.run.save_s)

    def _margin_s(self) -> float:
        save_s = self._longest_save_s() or min(_UNKNOWN_S, 0.1 * self._limit_s)
        return _TIMES * save_s + _STEPS * self._step_s

    def _wait(self) -> None:
        while (left_s := self._over - self._margin_s() - time.monotonic()) > 0:
            # Steps and checkpoints may become slower meanwhile.
            if self._ended.wait(min(left_s, _LOOK_S)):
                return
        limit = f"run.max_hours={self.run.recipe.run.max_hours:g}"
        if self._step_s:
            self.run.ask_to_stop(f"{limit} are nearly over", RESUMABLE)
        else:  # starting again would not help
            self.run.ask_to_stop(f"{limit} is hardly enough for a start: raise it")
