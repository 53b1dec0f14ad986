"""The file names of a run directory, in one place for all code that writes or reads them.

Decision: docs/decisions/0034-file-names-of-a-run-in-record.md.

RUN/
.lock                     names the process that writes here (runs/lock.py)
recipe.yaml               the resolved recipe
data.json                 classes, colours and sample counts of the data (runs/data.py)
deepspeed.json            a copy of engine.deepspeed_json, if the recipe names one
metrics.jsonl             a record for each step and each evaluation
log/rank-N.txt            the log of each rank, with tracebacks
log/collectives-rank-N    torch's record of the last collectives, for torchfrtrace, if a rank was lost
profile/rank-N.json.gz    the trace of each rank, if the recipe asks for one
skipped/rank-N.jsonl      bad samples that training skipped, if any
checkpoints/              see checkpoints/__init__.py; latest and best name checkpoints
evaluation/SPLIT-WEIGHTS.json  figures of `maskmatch evaluate`
pictures/SPLIT/           predictions for the report
trackers.json             by what names the trackers know this run, if the recipe asks for any
tensorboard/, wandb/      files of these trackers
summary.json              written when training has ended
report.html               the report on this run
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Paths in one run directory. Nothing is read or created."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe. A folder with this file is a run directory."""
        return self.path / "recipe.yaml"

    @property
    def lock(self) -> Path:
        """The process that writes here; there while a run lives."""
        return self.path / ".lock"

    @property
    def data(self) -> Path:
        """Class names, palette and sample counts of the data."""
        return self.path / "data.json"

    @property
    def deepspeed(self) -> Path:
        """The copy of the user's DeepSpeed settings."""
        return self.path / "deepspeed.json"

    @property
    def metrics(self) -> Path:
        """Records of steps and evaluations, one in each line."""
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

    def collectives(self, rank: int) -> Path:
        """What torch has kept of the last collectives of one rank."""
        return self.path / "log" / f"collectives-rank-{rank}"

    def profile(self, rank: int) -> Path:
        """Trace of one rank by torch's profiler."""
        return self.path / "profile" / f"rank-{rank}.json.gz"

    def skipped(self, rank: int) -> Path:
        """Bad samples that one rank skipped."""
        return self.path / "skipped" / f"rank-{rank}.jsonl"

    def evaluation(self, split: str, weights: str) -> Path:
        """Figures of ``weights`` (`ema` or `student`) on one split."""
        return self.evaluations / f"{split}-{weights}.json"

    @property
    def trackers(self) -> Path:
        """By what names the trackers know this run, for when it continues."""
        return self.path / "trackers.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def all_pictures(self) -> Path:
        """Folder of the pictures of all splits."""
        return self.path / "pictures"

    def pictures(self, split: str) -> Path:
        """Folder of the pictures of one split."""
        return self.all_pictures / split
