"""Evaluation during training, on the split `dev`, for the choice of settings. `maskmatch evaluate` uses `val`."""

from __future__ import annotations

from maskmatch_scale.evaluation.evaluate import evaluate_split
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.runs.evaluate import window_of
from maskmatch_scale.training.callbacks.base import Callback
from maskmatch_scale.training.run import Run


class Evaluation(Callback):
    """Evaluates the teacher every `run.evaluate_every` steps, and at the end the student too."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        dev = run.batches.index.streams.get("dev")
        self._possible = dev is not None and dev.labelled

    def wants_records(self, done: int) -> bool:
        """Before an evaluation, so that the records in the file are in the order of their steps."""
        return self.is_due(done, self.run.recipe.run.evaluate_every)

    def between_steps(self, done: int) -> None:
        """Evaluate if it is due; all ranks call it together. A run that is being stopped is not evaluated."""
        if self._possible and self.wants_records(done) and not self.run.stop_reason:
            for weights in ("ema", "student") if done == self.run.recipe.run.steps else ("ema",):
                self._evaluate(done, weights)

    def _evaluate(self, done: int, weights: str) -> None:
        run, runtime = self.run, self.run.runtime
        matrix = ConfusionMatrix(run.student.num_classes, run.data.ignore_index)
        run.student.eval()
        with run.engine.arithmetic(), run.teacher.gathered():
            evaluate_split(
                run.teacher if weights == "ema" else run.student,
                run.recipe.data,
                "dev",
                window_of(run.recipe, run.student, runtime.device),
                matrix,
                (runtime.rank, runtime.world_size),
                runtime.sum_over_ranks,
            )
        miou, accuracy = matrix.miou(), matrix.pixel_accuracy()
        record = {"step": done, "kind": "eval", "split": "dev", "weights": weights}
        run.add_evaluation(record | {"miou": miou, "pixel_accuracy": accuracy})
        run.say(f"step {done}: dev mIoU {miou:.4f}, pixel accuracy {accuracy:.4f} ({weights})")
