"""Writes a checkpoint every `run.checkpoint_every` steps, after the best evaluations, at the end, and before a stop.

Decision: docs/decisions/0045-checkpoints-written-in-the-background.md.
"""

from __future__ import annotations

import math
import time
from itertools import chain
from typing import Any

import torch

from maskmatch_scale import __version__
from maskmatch_scale.checkpoints.fit import run_facts
from maskmatch_scale.checkpoints.writing import Outcome
from maskmatch_scale.errors import TrainingStopped
from maskmatch_scale.training.callbacks.base import Callback, Record
from maskmatch_scale.training.run import Run

_AFTER_AN_ERROR_S = 60.0
"""How long a run that ends with an error waits for the checkpoint that is being written."""


class Checkpoints(Callback):
    """Has `checkpoints/step-XXXXXXXX` written, with the state of all callbacks in it, and counts those that failed.

    For every checkpoint `metrics.jsonl` gets a record of kind `checkpoint` (docs/resume.md).
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._failed = int(run.resumed.get("failed_saves", 0))
        self._in_a_row = 0
        self._begun = run.start
        """Step of the newest checkpoint, be it complete or not. The one that the run continues from is never replaced:
        it may be the only one."""
        self._recorded = 0
        """Step of the newest checkpoint with a record."""
        self._waited_s = 0.0
        """For all checkpoints together."""

    def wants_records(self, done: int) -> bool:
        """Before a checkpoint, so that a figure that is not finite stops the run before it is written."""
        return self.is_due(done, self.run.recipe.run.checkpoint_every)

    def between_steps(self, done: int) -> None:
        """Begin to write one if it is due; all ranks together."""
        outcome = self.run.writer.under_way
        if outcome is not None and not self.run.writer.is_writing:
            self._record(outcome, 0.0)
        if self.wants_records(done):
            self._save(done)

    def evaluated(self, record: Record) -> None:
        """Begin to write one if the teacher is among the best so far; all ranks together."""
        run = self.run
        if record["split"] != "dev" or record["weights"] != "ema" or not run.recipe.run.keep_best:
            return
        step, miou = int(record["step"]), float(record["miou"])
        if not math.isfinite(miou):  # no class occurs in `dev`
            return
        best = torch.zeros(1, dtype=torch.int64, device=run.runtime.device)
        if run.keeper is not None:
            run.keeper.scored(step, miou)
            best += run.keeper.is_best(step)
        if run.runtime.sum_over_ranks(best) and self._begun != step:
            self._save(step)

    def stopping(self, done: int) -> None:
        """Write one, unless that was done after this step, and wait for it.

        Raises:
            TrainingStopped: it cannot be written.
        """
        if self._begun != done:
            self._save(done)
        self._finish()

    def ended(self) -> None:
        """After an error: wait for the one that is being written, though not for long."""
        self.run.writer.join(_AFTER_AN_ERROR_S)

    def finished(self) -> None:
        """Wait for the last one.

        Raises:
            TrainingStopped: it cannot be written.
        """
        if self._begun < self.run.end:  # an evaluation has ended the run, after checkpoints of this step were begun
            self._save(self.run.end)
        self._finish()
        if self.run.keeper is not None:
            self.run.keeper.tidy(self._begun)  # the last evaluation came after its checkpoint was begun

    def state(self) -> dict[str, Any]:
        """How many could not be written."""
        return {"failed_saves": self._failed}

    def summary(self) -> dict[str, Any]:
        """The same, and the seconds that steps of this rank waited for checkpoints since the last start."""
        return self.state() | {"checkpoint_wait_s": self._waited_s}

    def _save(self, done: int) -> None:
        run, engine = self.run, self.run.engine
        self._collect()
        state = {
            **run.callback_state(),
            **run_facts(run.recipe, run.runtime.world_size),
            "model": run.model,
            "frozen_teacher": run.frozen_facts,
            "engine": engine.progress(),
            "versions": {"maskmatch_scale": __version__, "torch": str(torch.__version__)},
        }
        self._begun = done
        run.writer.save(
            done, chain(engine.pieces(), run.teacher.pieces()), state, run.batches.state(done), run.batches.own_state()
        )

    def _collect(self) -> Outcome | None:
        """Wait for the one that is being written. If too many have failed, the run has to stop."""
        run, began = self.run, time.monotonic()
        outcome = run.writer.wait()
        if outcome is None:
            return None
        run.save_s = max(run.save_s, outcome.copy_s + outcome.write_s)
        self._record(outcome, time.monotonic() - began)
        if outcome.error is None:
            self._in_a_row = 0
            return outcome
        self._failed += 1
        self._in_a_row += 1
        if run.keeper is not None:
            run.keeper.lost(outcome.step)
        most = run.recipe.run.max_failed_saves
        if self._in_a_row >= most:
            run.ask_to_stop(
                f"{self._in_a_row} checkpoints in a row could not be written (run.max_failed_saves={most}), the last "
                f"one because: {outcome.error}; {self._remedy()}"
            )
        return outcome

    def _finish(self) -> None:
        outcome = self._collect()
        if outcome is not None and outcome.error is not None:
            reason = f"{self.run.stopping.reason}; and " if self.run.stopping else ""
            raise TrainingStopped(
                f"{reason}the checkpoint of step {outcome.step} could not be written: {outcome.error}; {self._remedy()}"
            )

    def _remedy(self) -> str:
        newest = self.run.last_checkpoint
        return f"make room, and continue with --resume {newest}" if newest else "there is no checkpoint before it"

    def _record(self, outcome: Outcome, waited_s: float) -> None:
        if self._recorded == outcome.step:
            return
        self._recorded = outcome.step
        self._waited_s += outcome.copy_s + waited_s
        record: Record = {
            "step": outcome.step,
            "kind": "checkpoint",
            "copy_s": outcome.copy_s,
            "wait_s": waited_s,
            "write_s": outcome.write_s,
            "bytes": outcome.bytes,
        }
        if outcome.error is not None:
            record["error"] = outcome.error
            self.run.say(f"step {outcome.step}: the checkpoint could not be written: {outcome.error}")
        self.run.metrics.add(record)
