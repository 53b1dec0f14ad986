"""The end of a run that has taken all its steps: `summary.json` and the report."""

from __future__ import annotations

import json

import torch

from maskmatch_scale import __version__
from maskmatch_scale.errors import TrainingStopped
from maskmatch_scale.files import write_whole
from maskmatch_scale.progress import show
from maskmatch_scale.record.report import write_report
from maskmatch_scale.training.callbacks.base import Callback


class Closing(Callback):
    """Rank 0 writes the totals of all callbacks, and a report on this run."""

    def finished(self) -> None:
        """Collect the totals on all ranks, and write them on rank 0.

        Raises:
            TrainingStopped: on rank 0, if records of `metrics.jsonl` could not be written to the end.
        """
        run = self.run
        summary = {
            **run.callback_summary(),
            "world_size": run.runtime.world_size,
            "device": str(run.runtime.device),
            "versions": {"maskmatch_scale": __version__, "torch": torch.__version__},
        }
        if run.runtime.rank == 0:
            write_whole(run.folder.summary, json.dumps(summary, indent=1))
            show(f"report: {write_report([run.folder.path])}")
            lost = run.metrics.file
            if lost is not None and lost.fault is not None:
                raise TrainingStopped(
                    f"all {run.end} steps are taken, but {lost.waiting} records are lost: {lost.fault}",
                    on_all_ranks=False,
                )
