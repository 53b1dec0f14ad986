"""Writes a checkpoint every `run.checkpoint_every` steps, at the end, and before a run stops itself."""

from __future__ import annotations

import time

from maskmatch_scale.engine.checkpoint import save_checkpoint
from maskmatch_scale.training.callbacks.base import Callback


class Checkpoints(Callback):
    """Writes `checkpoints/step-XXXXXXXX` with the state of all callbacks in it."""

    def wants_records(self, done: int) -> bool:
        """Before a checkpoint, so that a figure that is not finite stops the run before it is written."""
        return self.is_due(done, self.run.recipe.run.checkpoint_every)

    def between_steps(self, done: int) -> None:
        """Write one if it is due; all ranks together."""
        if self.wants_records(done):
            self._save(done)

    def stopping(self, done: int) -> None:
        """Write one, unless that was done after this step."""
        if not self.wants_records(done):
            self._save(done)

    def _save(self, done: int) -> None:
        run, began = self.run, time.monotonic()
        run.last_checkpoint = save_checkpoint(
            run.folder, done, run.callback_state(), run.engine, run.teacher, run.runtime, run.batches.state(done)
        )
        run.save_s = max(run.save_s, time.monotonic() - began)
