"""`maskmatch sweep`: a recipe trained once for each combination of values, with one report on all of them.

Every run is `maskmatch train` in a process of its own, and its folder is a run directory like any other. The folders
are all the state of a sweep: one that is started again looks at them.

Decision: docs/decisions/0061-a-sweep-is-a-loop-over-recipes.md.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from types import FrameType

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

LOOK_S = 0.2
"""Seconds between two looks at the run that is under way."""
_LONGEST_NAME = 150
"""Letters of a folder's name; most file systems take 255 bytes."""
_MODULE = {"deepspeed": "--module", "torchrun": "-m", "accelerate": "--module"}
"""Launchers, and their option for a module of Python."""


@dataclass(frozen=True)
class Trial:
    """One combination of values."""

    name: str
    """`key=value` of the keys that have several values, with commas between them."""
    overrides: tuple[str, ...]
    """All overrides of the recipe, `run.dir` too."""
    recipe: Recipe

    @property
    def folder(self) -> RunFolder:
        """Its run directory."""
        return RunFolder(Path(self.recipe.run.dir))


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
        """The teacher's newest mIoU on `dev`, 0–1; NaN if it was evaluated and is not finite; None if it was not."""
        score = self.summary and self.summary.score("dev", "ema")
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


def plan(recipe: Path, overrides: Sequence[str], out: Path) -> list[Trial]:
    """All combinations of values, in the order in which they are written; nothing is written.

    Args:
        recipe: YAML file.
        overrides: `section.key=value`, or `section.key=value,value,…`. Commas within brackets, braces or quotes
            belong to a value.
        out: folder of the run directories.

    Raises:
        UserError: no key has several values, a key or value is given twice, or a combination is not a valid recipe.
    """
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, values = override.partition("=")
        if key == "run.dir":
            raise UserError(f"{override}: every run of a sweep has its own run.dir, below --out")
        if key in choices:
            raise UserError(f"{key} is given twice; write all its values with commas: {key}=…,…")
        # One without "=" is refused by load_recipe.
        choices[key] = [f"{key}={value}" for value in _split(values)] if equals else [override]
    keys = [key for key, settings in choices.items() if len(settings) > 1]
    if not keys:
        raise UserError("no key has several values; separate them by commas: maskmatch sweep RECIPE optim.lr=1e-5,1e-4")
    trials = []
    for settings in product(*choices.values()):
        name = _name(settings[place] for place, key in enumerate(choices) if key in keys)
        given = (*settings, f"run.dir={out / name}")
        trials.append(Trial(name, given, load_recipe(recipe, given)))
    for number, trial in enumerate(trials):
        if trial.name in (other.name for other in trials[:number]):
            raise UserError(f"two runs would have the folder {out / trial.name}; give every value of a key once")
    return trials


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
        UserError: before anything is written: see :func:`plan`; there are runs in `out`, and `resume` was not asked
            for, or they were trained with other settings.
    """
    if Place.from_environment().world_size > 1:
        raise UserError("a sweep starts its runs itself: start it without a launcher, and name that by --launcher")
    trials = plan(recipe, overrides, out)
    states = _states(trials, out, resume=resume)
    left = [trial for trial in trials if states[trial.name] != "finished"]
    already = f", {len(trials) - len(left)} of them finished" if len(left) < len(trials) else ""
    show(f"sweep: {len(trials)} runs in {out}{already}")
    stopped = None
    with _Runner(left[0].recipe.run.stop_signals if left else ()) as runner:
        for number, trial in enumerate(left, 1):
            show(f"\nrun {number} of {len(left)}: {trial.name}")
            words = [str(recipe), *trial.overrides]
            words += ["--resume", "auto"] if states[trial.name] == "stopped" else []
            code = runner.run([*_command(launcher), *words])
            states[trial.name] = _state(trial, code, runner.arrived)
            _report(trials, out)
            if states[trial.name] == "stopped" or (runner.arrived and number < len(left)):
                stopped = _reason(trial, runner.arrived)
                break
    rows = [Row(trial, _summary(trial), states[trial.name]) for trial in trials]
    return Sweep(tuple(sorted(rows, key=_rank)), _report(trials, out), stopped)


def table(found: Sweep) -> Table:
    """The runs for a terminal, best first."""
    shown = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("run", overflow="fold")
    for header in ("dev mIoU", "student", "steps", "time"):
        shown.add_column(header, justify="right", no_wrap=True)
    shown.add_column("")
    for row in found.rows:
        summary = row.summary
        student = summary and summary.score("dev", "student")
        figures = [_figure(row.miou), _figure(student.miou if student else None)]
        figures += ["–", "–"] if summary is None else [steps_of(summary), duration(summary.seconds)]
        shown.add_row(*map(Text, (row.trial.name, *figures, row.state)))
    return shown


def _split(values: str) -> list[str]:
    """The parts between commas that are in no brackets, braces or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in values:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
    return parts


def _name(settings: Iterator[str]) -> str:
    """A file name that says the settings. What is cut off of a long one is in a hash at its end."""
    plain = (re.sub(r"[\s\[\]{}\"']", "", setting) for setting in settings)
    whole = ",".join(re.sub(r"[^\w.=+-]+", "-", setting, flags=re.ASCII) for setting in plain)
    name = whole
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}-{sha256(whole.encode()).hexdigest()[:8]}"


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
        before = load_recipe(trial.folder.recipe)
        for what in ("data.root", "model", "method", "optim", "run.seed"):
            if _value(before, what) != _value(trial.recipe, what):
                raise UserError(
                    f"{trial.folder.recipe}: this run of {out} has another {what}, so the runs would not compare; "
                    "name another --out, or go back to the recipe of before"
                )
        summary = _summary(trial)
        done = summary is not None and summary.finished and summary.steps_done >= trial.recipe.run.steps
        states[trial.name] = "finished" if done else "stopped"
    return states


def _value(recipe: Recipe, what: str) -> object:
    value: object = recipe
    for name in what.split("."):
        value = getattr(value, name)
    return value


def _command(launcher: Sequence[str]) -> list[str]:
    """What comes before the recipe."""
    if not launcher:
        return [sys.executable, "-m", "maskmatch_scale", "train"]
    option = _MODULE.get(Path(launcher[0]).name)
    if option is None or "train" in launcher:
        return list(launcher)
    return [*launcher, option, "maskmatch_scale", "train"]


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


class _Runner:
    """Starts runs, and passes the signals that this process gets on to the one that is under way, each once.

    A run gets a session of its own: what a terminal sends at Ctrl-C would reach it directly too, and two of them end a
    run without a checkpoint.
    """

    def __init__(self, names: Sequence[str]) -> None:
        numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *(getattr(signal, name) for name in names)}
        # `nohup` ignores the end of the terminal for this process and all that it starts.
        self._numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self.arrived: list[signal.Signals] = []

    def __enter__(self) -> _Runner:
        self._before = {number: signal.signal(number, self._note) for number in self._numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.arrived.append(signal.Signals(number))

    def run(self, command: Sequence[str]) -> int:
        """Run a command to its end.

        Returns:
            Its exit code, or what the run itself has ended with where a launcher does not pass that on.

        Raises:
            UserError: there is no such command.
        """
        if self.arrived:
            return RESUMABLE
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "exit-code"
            environment = os.environ | {"MASKMATCH_EXIT_CODE_FILE": str(file)}
            try:
                child = subprocess.Popen(command, env=environment, start_new_session=True)
            except OSError as error:
                raise UserError(f"--launcher: {command[0]} cannot be started: {error.strerror}") from None
            told = 0
            while child.poll() is None:
                for number in self.arrived[told:]:
                    child.send_signal(number)
                    told += 1
                with suppress(subprocess.TimeoutExpired):
                    child.wait(LOOK_S)
            code = child.returncode
            if code and file.exists():
                return int(file.read_text())
            return code if code >= 0 else 128 - code
