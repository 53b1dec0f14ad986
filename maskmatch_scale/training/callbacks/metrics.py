"""The figures of the steps: kept on the device, read every `run.log_every` steps, and written to `metrics.jsonl`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from maskmatch_scale.training.callbacks.base import Callback, Record
from maskmatch_scale.training.step import StepFigures

log = logging.getLogger("maskmatch_scale")


class Metrics(Callback):
    """Hands the figures of every step to `run.metrics`, and logs the newest record."""

    def after_step(self, done: int, figures: StepFigures) -> None:
        """Keep the step's figures; nothing here waits for the device."""
        self.run.metrics.train(done, figures.known, figures.on_device, figures.later)

    def wants_records(self, done: int) -> bool:
        """Every `run.log_every` steps, and after the last one."""
        return self.is_due(done, self.run.recipe.run.log_every)

    def records_read(self, records: Sequence[Record]) -> None:
        """Log the newest record."""
        log.info("%s", json.dumps(records[-1]))

    def ended(self) -> None:
        """Try once more to write what could not be written."""
        if self.run.metrics.file is not None:
            self.run.metrics.file.append()
