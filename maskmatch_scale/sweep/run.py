"""`maskmatch sweep`: a recipe trained once for each combination of values, with one report on all of them.

Every run is `maskmatch train` in a process of its own, and its folder is a run directory like any other. The folders
are all the state of a sweep: one that is started again looks at them.

Decision: docs/decisions/0061-a-sweep-is-a-loop-over-recipes.md.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.errors import RESUMABLE, UserError
from maskmatch_scale.files import disk_fault
from maskmatch_scale.progress import show
from maskmatch_scale.recipe import Recipe, load_recipe
from maskmatch_scale.record.report import write_report
from maskmatch_scale.record.run_files import read_run
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.record.summary import RunSummary, duration, steps_of, summarise_files
from maskmatch_scale.runs.first_checks import check_data
from maskmatch_scale.runs.lock import refuse_live_run
from maskmatch_scale.sweep.plan import Trial, plan
from maskmatch_scale.sweep.runner import Runner, train_command

_NOT_COMPARED = frozenset(
    {
        "cache_dir",
        "cache_gb",
        "fetch_timeout_s",
        "fetch_attempts",
        "outage_s",
        "allow_pipe",
        "workers",
        "max_bad_share",
    }
)
"""Keys of `data` that do not change what a step is made of."""


@dataclass(frozen=True)
class Row:
    """What is known of a trial."""

    trial: Trial
    summary: RunSummary | None
    """None: its run directory is not there."""
    state: str
    """One or two words: finished, stopped, waiting, why it failed."""

    @property
    def miou(self) -> float | None:
        """The teacher's last mIoU on `dev` in training, 0–1; NaN if it is not finite; None if it was not evaluated."""
        score = self.summary and self.summary.in_training("ema")
        return None if not score else math.nan if score.miou is None else score.miou

    @property
    def finished(self) -> bool:
        """Whether the run has taken all its steps."""
        return self.summary is not None and self.summary.finished

    @property
    def failed(self) -> bool:
        """Whether the run ended with an error in this sweep."""
        return self.state.startswith("failed")


@dataclass(frozen=True)
class Sweep:
    """What came out."""

    rows: tuple[Row, ...]
    """Best first; then runs that were not evaluated, then those that have not finished."""
    report: Path | None
    """None: no run has written anything yet."""
    stopped: tuple[str, int] | None
    """Why the sweep ended before its last run, and the exit code."""

    @property
    def best(self) -> Row | None:
        """The run with the highest mIoU on `dev`, of those that have finished."""
        first = self.rows[0]
        return first if first.finished and first.miou is not None and not math.isnan(first.miou) else None


def run(
    recipe: Path, overrides: Sequence[str], out: Path, *, resume: bool = False, launcher: Sequence[str] = ()
) -> Sweep:
    """Train all combinations, one after the other, and write `out/report.html` after each.

    Args:
        recipe: see :func:`plan`.
        overrides: likewise.
        out: likewise.
        resume: whether runs that are there already count: finished ones are left as they are, others go on from their
            newest checkpoint.
        launcher: command that starts a run on several ranks; it gets the recipe, the overrides, and perhaps `--resume
            auto`. Empty: one process.

    Raises:
        UserError: before anything is written: see :func:`plan`; data are not there; there are runs in `out`, and
            `resume` was not asked for, or they were trained with other settings. Later too: another process has the
            folder of the next run.
    """
    if Place.from_environment().world_size > 1:
        raise UserError("a sweep starts its runs itself: start it without a launcher, and name that by --launcher")
    trials = plan(recipe, overrides, out)
    if not launcher:  # one may start the runs on other machines
        for trial in trials:
            check_data(trial.recipe)
    states = _states(trials, out, resume=resume)
    left = [trial for trial in trials if states[trial.name] != "finished"]
    already = f", {len(trials) - len(left)} of them finished" if len(left) < len(trials) else ""
    show(f"sweep: {len(trials)} runs in {out}{already}")
    stopped = report = None
    with Runner(left[0].recipe.run.stop_signals if left else ()) as runner:
        for number, trial in enumerate(left, 1):
            refuse_live_run(trial.folder)
            show(f"\nrun {number} of {len(left)}: {trial.name}")
            words = [str(recipe), *trial.overrides]
            words += ["--resume", "auto"] if states[trial.name] == "stopped" else []
            code = runner.run([*train_command(launcher), *words])
            states[trial.name] = _state(trial, code, runner.arrived)
            report = _report(trials, out)
            if states[trial.name] == "stopped" or (runner.arrived and number < len(left)):
                stopped = _reason(trial, runner.arrived)
                break
    rows = [Row(trial, _summary(trial), states[trial.name]) for trial in trials]
    return Sweep(tuple(sorted(rows, key=_rank)), report if left else _report(trials, out), stopped)


def table(found: Sweep) -> Table:
    """The runs for a terminal, best first."""
    shown = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("run", overflow="fold")
    for header in ("dev mIoU", "student", "steps", "time"):
        shown.add_column(header, justify="right", no_wrap=True)
    shown.add_column("")
    for row in found.rows:
        summary = row.summary
        student = summary and summary.in_training("student")
        figures = [_figure(row.miou), _figure(student.miou if student else None)]
        figures += ["–", "–"] if summary is None else [steps_of(summary), duration(summary.seconds)]
        shown.add_row(*map(Text, (row.trial.name, *figures, row.state)))
    return shown


def _states(trials: Sequence[Trial], out: Path, *, resume: bool) -> dict[str, str]:
    """`finished`, `stopped` (it goes on) or `waiting` for each trial.

    Raises:
        UserError: there are runs, and they are not asked for or do not fit.
    """
    states = {}
    for trial in trials:
        states[trial.name] = "waiting"
        if not trial.folder.recipe.is_file():
            continue
        if not resume:
            raise UserError(
                f"{trial.folder.path} is there already; go on with that sweep by --resume auto, or name another --out"
            )
        refuse_live_run(trial.folder)
        before = load_recipe(trial.folder.recipe)
        for what in _compared(before):
            if _value(before, what) != _value(trial.recipe, what):
                raise UserError(
                    f"{trial.folder.recipe}: this run of {out} has another {what}, so the runs would not compare; "
                    "name another --out, or go back to the recipe of before"
                )
        summary = _summary(trial)
        done = summary is not None and summary.finished and _is_long_enough(summary, before, trial.recipe)
        states[trial.name] = "finished" if done else "stopped"
    return states


def _compared(recipe: Recipe) -> list[str]:
    """Keys and sections in which runs must be alike, so that their scores compare."""
    data = [f"data.{key}" for key in type(recipe.data).model_fields if key not in _NOT_COMPARED]
    return [*data, "model", "method", "optim", "engine.micro_batch", "engine.accumulation", "run.seed"]


def _is_long_enough(summary: RunSummary, before: Recipe, wanted: Recipe) -> bool:
    """Whether a run that has ended took the steps that are wanted now, or would end early again."""
    same = (before.run.steps, before.run.patience) == (wanted.run.steps, wanted.run.patience)
    return summary.steps_done >= wanted.run.steps or (summary.ended_early is not None and same)


def _value(recipe: Recipe, what: str) -> object:
    value: object = recipe
    for name in what.split("."):
        value = getattr(value, name)
    return value


def _state(trial: Trial, code: int, arrived: Sequence[signal.Signals]) -> str:
    if code == 0:
        return "finished"
    if code == RESUMABLE or arrived:  # one that has just been started may have died of the signal
        return "stopped"
    files = read_run(trial.folder.path) if trial.folder.recipe.is_file() else None
    if files is not None and files.train.steps.size and not math.isfinite(files.train.values["loss"][-1]):
        return f"failed: loss not finite at step {files.train.steps[-1]}"
    return f"failed: exit code {code}"


def _reason(trial: Trial, arrived: Sequence[signal.Signals]) -> tuple[str, int]:
    """Why no further run is started, and the exit code of the sweep."""
    why = f"got {arrived[0].name}" if arrived else "the run has stopped"
    twice = arrived.count(signal.SIGINT) > 1
    return f"{why}; the sweep ends in {trial.name}", 128 + signal.SIGINT if twice else RESUMABLE


def _summary(trial: Trial) -> RunSummary | None:
    return summarise_files(read_run(trial.folder.path)) if trial.folder.recipe.is_file() else None


def _report(trials: Sequence[Trial], out: Path) -> Path | None:
    """Write the report on all runs that are there. A disk that is full does not end the sweep."""
    there = [trial.folder.path for trial in trials if trial.folder.recipe.is_file()]
    try:
        return write_report(there, RunFolder(out).report) if there else None
    except OSError as error:
        show(f"no report: {disk_fault(error) or error}")
        return None


def _rank(row: Row) -> tuple[bool, bool, float]:
    miou = row.miou
    known = miou is not None and not math.isnan(miou)
    return not row.finished, not known, -miou if miou is not None and known else 0.0


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
