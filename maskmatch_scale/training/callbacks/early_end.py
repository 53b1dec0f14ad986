"""Ends a run early when the teacher has not become better for `run.patience` evaluations on `dev`.

Decision: docs/decisions/0058-early-stopping.md.
"""

from __future__ import annotations

import math
import shlex
from typing import Any

import torch

from maskmatch_scale.checkpoints.layout import BEST
from maskmatch_scale.record.run_files import read_run
from maskmatch_scale.training.callbacks.base import Callback, Record
from maskmatch_scale.training.run import Run


class EarlyEnd(Callback):
    """Counts evaluations since the best one. What was evaluated before this start is read from `metrics.jsonl`.

    When the run ends, `metrics.jsonl` gets a record of kind `early_end`.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._patience = run.recipe.run.patience
        self._best, self._best_step = -math.inf, 0
        self._without_better = 0

    def started(self) -> None:
        """Take up the scores of this run so far, which rank 0 tells the others; a run that has ended stays ended."""
        run = self.run
        if self._patience is None:
            return
        known = torch.zeros(3, dtype=torch.float64, device=run.runtime.device)
        if run.runtime.rank == 0:
            before = read_run(run.folder.path).progress if run.start and run.folder.metrics.exists() else ()
            for score in before:
                if score.step is not None and score.step <= run.start and _counts(score.split, score.weights):
                    self._take(score.step, score.miou)
            found = [self._best, self._best_step, self._without_better]
            known += torch.tensor(found, dtype=known.dtype, device=known.device)
        # A best of -inf too: ranks that do not count the same would not end after the same step.
        best, best_step, without = run.runtime.sum_over_ranks(known).tolist()
        self._best, self._best_step, self._without_better = best, int(best_step), int(without)
        if self._is_due(run.start):
            run.end_early(run.start)  # as it did before
            run.say(self._line(run.start))

    def evaluated(self, record: Record) -> None:
        """Count the score; all ranks have the same."""
        if self._patience is not None and _counts(record["split"], record["weights"]):
            step = int(record["step"])
            self._take(step, float(record["miou"]))
            if self._is_due(step):
                self.run.end_early(step)
                self.run.say(self._line(step))
                self.run.metrics.write({"kind": "early_end", **self._found(step)})

    def summary(self) -> dict[str, Any]:
        """`ended_early`: after which step, and the best one; nothing if the run took all its steps."""
        return {"ended_early": self._found(self.run.end)} if self.run.end < self.run.recipe.run.steps else {}

    def _take(self, step: int, miou: float | None) -> None:
        if miou is not None and miou > self._best:  # NaN is not better: no class occurs in `dev`
            self._best, self._best_step, self._without_better = miou, step, 0
        else:
            self._without_better += 1

    def _is_due(self, done: int) -> bool:
        """Whether the run ends early after this step; its last step is no early end."""
        patience = self._patience
        return patience is not None and self._without_better >= patience and done < self.run.recipe.run.steps

    def _line(self, done: int) -> str:
        best = self.run.folder.checkpoints / BEST
        than = (
            f" than {self._best:.4f} at step {self._best_step} (run.patience={self._patience}); to measure that: "
            f"maskmatch evaluate {shlex.quote(str(best))}"
            if self._best_step
            else f", nor any that is a number (run.patience={self._patience})"
        )
        after = f"after {self._without_better} evaluations without a better dev mIoU"
        return f"step {done}: the run ends early, {after}{than}"

    def _found(self, step: int) -> dict[str, Any]:
        best = self._best if math.isfinite(self._best) else None
        return {"step": step, "best_step": self._best_step, "best_miou": best, "evaluations": self._without_better}


def _counts(split: str, weights: str) -> bool:
    return split == "dev" and weights == "ema"
