"""Evaluation during training, on the split `dev`, for the choice of settings. `maskmatch evaluate` uses `val`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from maskmatch_scale.data.batches.training import outage_s
from maskmatch_scale.evaluation.evaluate import evaluate_split
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.evaluation.scored import mean_warnings, scored_classes
from maskmatch_scale.record.run_files import read_run
from maskmatch_scale.runs.evaluate import inference_of
from maskmatch_scale.training.callbacks.base import Callback
from maskmatch_scale.training.run import Run


class Evaluation(Callback):
    """Evaluates the teacher every `run.evaluate_every` steps, and at the end the student too."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        dev = run.batches.index.streams.get("dev")
        self._possible = dev is not None and dev.labelled
        self._warned: set[str] = set()

    def wants_records(self, done: int) -> bool:
        """Before an evaluation, so that the records in the file are in the order of their steps."""
        return self.is_due(done, self.run.recipe.run.evaluate_every)

    def started(self) -> None:
        """Make up for what is missing of an evaluation after the step from which the run continues.

        A stop breaks an evaluation off. The checkpoint of that step is there, so nothing else would repeat it.
        """
        run, done = self.run, self.run.start
        if done and self._possible and self.wants_records(done):
            weights = self._weights(done)
            missing = torch.zeros(len(weights), dtype=torch.int64, device=run.runtime.device)
            if run.runtime.rank == 0 and run.folder.metrics.exists():  # not so if it continues another run's checkpoint
                there = {score.weights for score in read_run(run.folder.path).progress if score.step == done}
                missing += torch.tensor([kind not in there for kind in weights], device=missing.device)
            missed = run.runtime.sum_over_ranks(missing).tolist()
            self._evaluate(done, [kind for kind, is_missing in zip(weights, missed, strict=True) if is_missing])

    def between_steps(self, done: int) -> None:
        """Evaluate if it is due; all ranks call it together. A run that is being stopped is not evaluated."""
        if self._possible and self.wants_records(done):
            self._evaluate(done, self._weights(done))

    def _weights(self, done: int) -> Sequence[str]:
        return ("ema", "student") if done == self.run.end else ("ema",)

    def _evaluate(self, done: int, weights: Sequence[str]) -> None:
        end = self.run.end
        for kind in weights:
            if not self.run.stopping:
                self._evaluate_one(done, kind)
        if self.run.end != end:  # the score has ended the run
            self._evaluate(done, [kind for kind in self._weights(done) if kind not in weights])

    def _evaluate_one(self, done: int, weights: str) -> None:
        """Evaluate, unless a rank wants to stop: then all ranks break off, and know why."""
        run, runtime = self.run, self.run.runtime
        matrix = ConfusionMatrix(run.student.num_classes, run.data.ignore_index)
        run.student.eval()
        with run.engine.arithmetic(), run.teacher.gathered():
            images = evaluate_split(
                run.teacher if weights == "ema" else run.student,
                run.recipe.data,
                "dev",
                inference_of(run.recipe, run.student, runtime.device),
                matrix,
                (runtime.rank, runtime.world_size),
                runtime.sum_over_ranks,
                break_off=lambda: run.agreement.wanted is not None,
                patience_s=outage_s(run.recipe),
                unreachable=lambda error: run.ask_to_stop(
                    f"step {done}: the evaluation cannot go on: {error}. Check the network and the server, then "
                    "continue with --resume auto, which begins with this evaluation"
                ),
            )
        if images is None:
            run.agreement.settle()
            return
        miou, accuracy = matrix.miou(), matrix.pixel_accuracy()
        record = {"step": done, "kind": "eval", "split": "dev", "weights": weights}
        scored = scored_classes(matrix, run.data.classes)
        run.add_evaluation(record | {"miou": miou, "pixel_accuracy": accuracy} | scored)
        of = f"{scored['classes_in_mean']} of {scored['classes']} classes"
        run.say(f"step {done}: dev mIoU {miou:.4f} ({of}), pixel accuracy {accuracy:.4f} ({weights})")
        for line in mean_warnings(record | scored):
            if line not in self._warned:
                self._warned.add(line)
                run.say(f"warning: {line}")
