"""Writes a checkpoint every `run.checkpoint_every` steps, at the end, and before a run stops itself."""

from __future__ import annotations

from maskmatch_scale.engine.checkpoint import save_checkpoint
from maskmatch_scale.training.callbacks.base import Callback


class Checkpoints(Callback):
    """Writes `checkpoints/step-XXXXXXXX` with the state of all callbacks in it."""

    def wants_records(self, done: int) -> bool:
        """Before a checkpoint, so that a figure that is not finite stops the run before it is written."""
        return self.is_due(done, self.run.recipe.run.checkpoint_every)

    def between_steps(self, done: int) -> None:
        """Write a checkpoint if it is due; all ranks call it together."""
        run = self.run
        if self.wants_records(done) or run.stop_reason:
            run.last_checkpoint = save_checkpoint(
                run.folder, done, run.callback_state(), run.engine, run.teacher, run.runtime, run.batches.state(done)
            )
