"""One cell in a process of its own: `python -m benchmarks.ablation.cell JOB.json`."""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.ablation.equal_cost import check_measured
from benchmarks.ablation.job import EQUAL_STEPS, check_code, read_job
from benchmarks.ablation.variants import callbacks_of
from benchmarks.ablation.watch import Watch
from benchmarks.harness import say
from maskmatch_scale.checkpoints.finding import has_checkpoint
from maskmatch_scale.errors import StartInterrupted, TrainingStopped, UserError
from maskmatch_scale.files import write_whole
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.lock import refuse_live_run
from maskmatch_scale.train import train
from maskmatch_scale.training.run import Run

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let this process be stopped when the one that started it is gone, also if that was killed (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_cell(path: Path) -> None:
    """Train and evaluate a cell, or go on with it; writes `result.json` beside the job.

    Raises:
        UserError: of the recipe or its data; or the code is another than the one that planned the cell; or
            `--cost` is of another step.
        TrainingStopped: it was asked to stop; a checkpoint is there, unless it has none at all.
    """
    job, folder = read_job(path), path.parent
    check_code(job)
    recipe = job.parsed()
    made: list[Watch] = []

    def watch(run: Run) -> Watch:
        check_measured(job.cost, run.work.flops / 2e9)
        made.append(Watch(run, job, folder / "progress"))
        return made[0]

    own = RunFolder(Path(recipe.run.dir))
    refuse_live_run(own)
    if not has_checkpoint(own.path):
        shutil.rmtree(own.path, ignore_errors=True)  # it would be kept under another name
    run = train(recipe, "auto", callbacks=[*callbacks_of(job.variant, job.marks[EQUAL_STEPS]), watch])
    found = made[0]
    size = found.run
    result = {
        **asdict(job),
        "curve": found.curve,
        "results": found.marks,
        "gmacs": size.work.flops / 2e9,
        "burn_in_gmacs": size.burn_in_work.flops / 2e9,
        "burn_in_steps": size.recipe.burn_in_steps,
        "device": str(size.runtime.device),
        "torch": torch.__version__,
    }
    write_whole(folder / "result.json", json.dumps(result, indent=1, ensure_ascii=False))
    if not job.keep_checkpoints:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # a large model a cell, which nothing reads again


def main() -> None:
    """Run the cell that the command line names; 2 for a mistake, 75 if it was stopped."""
    end_with_parent()
    try:
        run_cell(Path(sys.argv[1]))
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    except (TrainingStopped, StartInterrupted) as error:
        say(f"stopped: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
