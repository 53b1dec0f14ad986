"""The callback of a cell: evaluates the teacher, and counts the time of training without these evaluations."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation.job import Job
from benchmarks.ablation.measure import Interrupted, check_pseudo_labels, score
from maskmatch_scale.files import write_whole
from maskmatch_scale.training.callbacks import Callback
from maskmatch_scale.training.callbacks.checkpoints import Checkpoints
from maskmatch_scale.training.callbacks.closing import Closing
from maskmatch_scale.training.callbacks.evaluation import Evaluation
from maskmatch_scale.training.callbacks.live_report import LiveReport
from maskmatch_scale.training.run import Run

PROGRESS_EVERY_S = 5.0


class Watch(Callback):
    """Evaluates on `dev` every so many steps, and on all splits at the marks. What it has found goes into checkpoints.

    The run's own last evaluations and its report are left out: they would cost more than a short run does.

    Args:
        run: of the cell, one rank.
        job: the cell.
        progress: file that is written every few seconds: steps taken, and steps in all.
    """

    def __init__(self, run: Run, job: Job, progress: Path) -> None:
        super().__init__(run)
        self.job, self.progress = job, progress
        before = run.resumed.get("ablation", {})
        self.curve: list[dict[str, Any]] = before.get("curve", [])
        self.marks: dict[str, dict[str, Any]] = before.get("marks", {})
        self._spent = [float(value) for value in before.get("spent", (0.0, 0.0))]
        self._shown = 0.0

    def started(self) -> None:
        """Leave out callbacks that the cell has no use for; evaluate what a stop has broken off."""
        unused: tuple[type[Callback], ...] = (Evaluation, LiveReport, Closing)
        if not self.run.recipe.run.checkpoint_every:
            unused += (Checkpoints,)
        # A new list: the loop is going through the old one.
        self.run.callbacks = [callback for callback in self.run.callbacks if not isinstance(callback, unused)]
        self._begin()
        if self.run.start:
            self._evaluate(self.run.start)

    def before_step(self, step: int) -> None:
        """Tell how far it is, if it was not told lately."""
        if time.monotonic() - self._shown > PROGRESS_EVERY_S:
            self._shown = time.monotonic()
            write_whole(self.progress, f"{step} {self.job.steps}\n")

    def between_steps(self, done: int) -> None:
        """Evaluate if it is due."""
        if not self.run.stopping:
            self._evaluate(done)

    def spent(self) -> tuple[float, float]:
        """Seconds of training so far, without evaluations: wall time, and CPU time of this process."""
        wall, cpu = self._spent
        return wall + time.monotonic() - self._began[0], cpu + time.process_time() - self._began[1]

    def state(self) -> dict[str, Any]:
        """What was found, and the seconds of training."""
        return {"ablation": {"curve": self.curve, "marks": self.marks, "spent": self.spent()}}

    def _begin(self) -> None:
        self._began = time.monotonic(), time.process_time()

    def _evaluate(self, done: int) -> None:
        """Evaluate what is due after a step and was not evaluated; the clocks stand meanwhile."""
        job = self.job
        names = [name for name, step in job.marks.items() if step == done and name not in self.marks]
        on_curve = done % job.evaluate_every == 0 and all(point["step"] != done for point in self.curve)
        if not names and not on_curve:
            return
        if self.run.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.run.runtime.device)
        seconds = self.spent()
        self._spent = list(seconds)
        try:
            self._add(done, names, seconds)
        except Interrupted:
            pass  # the run stops now; its next start evaluates this
        finally:
            self._begin()

    def _add(self, done: int, names: list[str], seconds: tuple[float, float]) -> None:
        run, job = self.run, self.job
        found = {"step": done, "wall_s": seconds[0], "cpu_s": seconds[1]}
        at_marks, dev = {}, None
        if names:
            splits = {split: score(run, split, job.eval_images, boundaries=True) for split in ("dev", *job.splits)}
            labels = check_pseudo_labels(run, min(job.pseudo_images, job.eval_images or job.pseudo_images))
            at_marks = {name: {**found, "splits": splits, "pseudo_labels": labels} for name in names}
            dev = splits["dev"] if job.curve_images == job.eval_images else None
        if dev is None:
            dev = score(run, "dev", job.curve_images, boundaries=False)
        self.marks |= at_marks
        self.curve.append({**found, "miou": dev["miou"], "pixel_accuracy": dev["pixel_accuracy"]})
        run.say(f"step {done}: teacher on dev: mIoU {dev['miou']:.4f}")
