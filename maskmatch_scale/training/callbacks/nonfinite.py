"""Stops a run when a loss or a gradient is not finite, or lets it leave out a few such steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from maskmatch_scale.errors import TrainingStopped
from maskmatch_scale.method.maskmatch import PARTS
from maskmatch_scale.training.callbacks.base import Callback, Record
from maskmatch_scale.training.run import Run
from maskmatch_scale.training.step import StepFigures

log = logging.getLogger("maskmatch_scale")


class NonFinite(Callback):
    """Stops a run whose weights are no longer finite. Counts steps that were left out (`run.max_nonfinite_steps`)."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.left_out = int(run.resumed.get("steps_left_out", 0))
        self._just_left_out = False

    def after_step(self, done: int, figures: StepFigures) -> None:
        """Count a step that was left out."""
        self._just_left_out = figures.left_out
        self.left_out += figures.left_out

    def wants_records(self, done: int) -> bool:
        """After a step that was left out."""
        return self._just_left_out

    def records_read(self, records: Sequence[Record]) -> None:
        """Stop the run if a step that was taken was not finite, or if too many were left out.

        Raises:
            TrainingStopped: names the step, the figures and the last good checkpoint.
        """
        for record in records:
            overflow = record.get("overflow", False)
            # In fp16 a gradient overflows now and then: the step is not taken, and the loss scale falls. But a smaller
            # scale does not mend a loss that is not finite, so such a step counts as one that was left out.
            self.left_out += overflow and not math.isfinite(record["loss"])
            norm = 0.0 if overflow else record["grad_norm"] or 0.0
            left_out = record.get("left_out", False) or overflow
            if math.isfinite(record["loss"] + norm) and not record.get("left_out"):
                continue
            # A gradient can overflow although the loss did not, and the weights are lost all the same.
            if not left_out or self.left_out > self.run.recipe.run.max_nonfinite_steps:
                raise TrainingStopped(self._message(record))
            log.warning("step %d left out: the %s is not finite", record["step"], _what(record))

    def state(self) -> dict[str, Any]:
        """How many steps were left out, so that stops and new starts do not allow more of them."""
        return {"steps_left_out": self.left_out}

    def _message(self, record: Record) -> str:
        shown = ", ".join(f"{name}={record[name]}" for name in (*PARTS, "grad_norm") if record.get(name) is not None)
        checkpoint = self.run.last_checkpoint
        remedy = "there is no checkpoint before it"
        if checkpoint:
            remedy = f"the last good checkpoint is {checkpoint}: continue with --resume {checkpoint}"
        return (
            f"step {record['step']}: the {_what(record)} is not finite ({shown}); {remedy}. "
            "Lower optim.lr or set optim.clip_norm"
        )


def _what(record: Record) -> str:
    """Which of the two is not finite."""
    return "gradient" if math.isfinite(record["loss"]) else "loss"
