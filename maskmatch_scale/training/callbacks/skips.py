"""Bad samples that training skipped: a list in `RUN/skipped/rank-N.jsonl`, a count over all ranks, and a limit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from maskmatch_scale.training.callbacks.base import Callback, Record
from maskmatch_scale.training.run import Run
from maskmatch_scale.training.step import StepFigures

IMAGES_BEFORE_A_SHARE = 1000
"""The share of skipped samples is taken of at least this many images. Otherwise a few bad samples early in a run
would exceed it."""


class Skips(Callback):
    """Lists on each rank the samples that it skipped. All ranks have the same counts, and stop if they are too high."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.read = int(run.resumed.get("images_read", 0))
        self.skipped = int(run.resumed.get("images_skipped", 0))
        self._path = run.folder.skipped(run.runtime.rank)

    def after_step(self, done: int, figures: StepFigures) -> None:
        """List the samples that this rank skipped in the step."""
        self.read += figures.images
        if figures.skipped:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.writelines(json.dumps({"step": done, **asdict(skip)}) + "\n" for skip in figures.skipped)

    def records_read(self, records: Sequence[Record]) -> None:
        """Count the samples that all ranks skipped, and stop the run if their share is above `data.max_bad_share`."""
        before = self.skipped
        self.skipped += sum(sum(record.get("skipped", {}).values()) for record in records)
        if self.skipped and not before:
            self.run.say(f"a bad sample was skipped; {self._path.parent} lists all skipped samples")
        limit = self.run.recipe.data.max_bad_share
        if self.skipped > limit * max(self.read, IMAGES_BEFORE_A_SHARE):
            self.run.ask_to_stop(
                f"step {records[-1]['step']}: {self.skipped} samples were skipped, {self.read} used "
                f"({self.skipped / max(self.read, 1):.2%}; data.max_bad_share={limit}); {self._path.parent} lists them "
                "with their reasons. Repair the shards or raise the limit, then continue with --resume auto"
            )

    def state(self) -> dict[str, Any]:
        """Images read and skipped by all ranks."""
        return {"images_read": self.read, "images_skipped": self.skipped}
