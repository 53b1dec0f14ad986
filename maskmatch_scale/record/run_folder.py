"""The files of a run directory: their names, in one place for those that write and those that read them.

RUN/
recipe.yaml               the resolved recipe
data.json                 classes, colours and sample counts of the data (runs/data.py)
deepspeed.json            a copy of engine.deepspeed_json, if the recipe names one
metrics.jsonl             one record a step and one an evaluation
log/rank-N.txt            what each rank logged, tracebacks included
skipped/rank-N.jsonl      samples that training passed over, if there were any
checkpoints/              engine/checkpoint.py
evaluation/SPLIT-WEIGHTS.json    figures of `maskmatch evaluate`
pictures/SPLIT/           predictions for the report
summary.json              written when training has ended
report.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Paths within one run directory; nothing is read or made."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; a folder is a run directory if it has one."""
        return self.path / "recipe.yaml"

    @property
    def data(self) -> Path:
        """What the run's model has to do with its data."""
        return self.path / "data.json"

    @property
    def deepspeed(self) -> Path:
        """The copy of the user's DeepSpeed settings."""
        return self.path / "deepspeed.json"

    @property
    def metrics(self) -> Path:
        """Records, a line each."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """Folder of the figures of `maskmatch evaluate`."""
        return self.path / "evaluation"

    @property
    def summary(self) -> Path:
        """Totals, written when training has ended."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The report on this run alone."""
        return self.path / "report.html"

    def log(self, rank: int) -> Path:
        """Log of one rank."""
        return self.path / "log" / f"rank-{rank}.txt"

    def skipped(self, rank: int) -> Path:
        """Samples that one rank passed over."""
        return self.path / "skipped" / f"rank-{rank}.jsonl"

    def evaluation(self, split: str, weights: str) -> Path:
        """Figures of ``weights`` (`ema` or `student`) on one split."""
        return self.evaluations / f"{split}-{weights}.json"

    def pictures(self, split: str) -> Path:
        """Folder of the predictions on one split."""
        return self.path / "pictures" / split
