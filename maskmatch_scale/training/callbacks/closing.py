"""The end of a run that has taken all its steps: `summary.json` and the report."""

from __future__ import annotations

import json

import torch

from maskmatch_scale import __version__
from maskmatch_scale.files import write_whole
from maskmatch_scale.record.report import write_report
from maskmatch_scale.training.callbacks.base import Callback


class Closing(Callback):
    """Rank 0 writes the totals of all callbacks, and a report on this run."""

    def finished(self) -> None:
        """Collect the totals on all ranks, and write them on rank 0."""
        run = self.run
        summary = {
            **run.callback_summary(),
            "world_size": run.runtime.world_size,
            "device": str(run.runtime.device),
            "versions": {"maskmatch_scale": __version__, "torch": torch.__version__},
        }
        if run.runtime.rank == 0:
            write_whole(run.folder.summary, json.dumps(summary, indent=1))
            print(f"report: {write_report([run.folder.path])}", flush=True)  # noqa: T201
