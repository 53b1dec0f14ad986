"""The progress of a run: a live bar on a terminal or in a notebook, lines in a file, nothing on ranks other than 0.

It shows figures of the steps, and leaves the slow first steps out of the time left; for other commands see
`maskmatch_scale/progress.py`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from maskmatch_scale.progress import NotebookBar, in_notebook, output_may_fail

WARM_UP_STEPS = 3
"""The first steps are left out of the time per step, because they load, allocate and compile."""


class TrainingProgress:
    """The bar, or the lines, of one run.

    Args:
        steps: number of steps of the whole run.
        start: number of steps that were taken before.
        shown: whether anything is shown; False on every rank except 0.
    """

    def __init__(self, steps: int, start: int, *, shown: bool) -> None:
        self.steps = steps
        self._in_notebook = shown and in_notebook()
        # Not rich's way for notebooks, which needs ipywidgets; and their output claims to be a terminal.
        terminal = False if self._in_notebook else None
        self._console = Console(file=sys.stdout, quiet=not shown, force_jupyter=False, force_terminal=terminal)
        in_terminal = shown and self._console.is_terminal
        self._live = in_terminal or self._in_notebook
        figures = () if self._in_notebook else (TextColumn("{task.fields[figures]}"),)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            *figures, console=self._console, disable=not in_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, completed=start, figures="")
        self._counted_from: tuple[int, float] | None = None
        self._warm_from = start + WARM_UP_STEPS
        self._cheap = False
        self._below_cell: NotebookBar | None = None

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        if self._in_notebook:
            self._below_cell = NotebookBar(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._below_cell is not None:
            self._below_cell.draw(at_once=True)

    def phase(self, *, cheap: bool) -> None:
        """Say whether the next steps are cheap (the burn-in). If that changes, the time per step is measured anew."""
        if cheap != self._cheap:
            self._cheap, self._counted_from = cheap, None

    def step(self, done: int) -> None:
        """``done`` steps have been taken."""
        if self._counted_from is None and done >= self._warm_from:
            self._counted_from = (done, time.monotonic())
        self._bar.update(self._task, completed=done)
        if self._below_cell is not None:
            self._below_cell.draw()

    def figures(self, record: Mapping[str, Any]) -> None:
        """Show the figures of a train record."""
        text = _figures(record, self._remaining(record["step"]), at_least=self._cheap)
        self._bar.update(self._task, figures=text)
        if self._below_cell is not None:
            self._below_cell.text = text
            self._below_cell.draw()
        if not self._live:
            self._print(f"step {record['step']}/{self.steps}  {text}")

    def say(self, line: str) -> None:
        """Show one line above the bar."""
        self._print(line)

    def _print(self, line: str) -> None:
        with output_may_fail():
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _remaining(self, done: int) -> float | None:
        """Seconds left, by the time per step since the warm-up; None if it is not known yet."""
        if self._counted_from is None or done <= self._counted_from[0]:
            return None
        first, since = self._counted_from
        return (time.monotonic() - since) / (done - first) * (self.steps - done)


def _figures(record: Mapping[str, Any], remaining_s: float | None, *, at_least: bool) -> str:
    parts = [
        f"{label} {record[key]:{form}}{unit}"
        for key, label, form, unit in (
            ("loss", "loss", ".3f", ""), ("loss_x", "x", ".3f", ""), ("loss_u", "u", ".3f", ""),
            ("loss_m", "m", ".3f", ""), ("coverage", "coverage", ".0%", ""), ("lr", "lr", ".1e", ""),
            ("images_per_s", "", ".1f", " img/s"), ("tokens_per_s", "", ",.0f", " tok/s"), ("mfu", "MFU", ".0%", ""),
            ("gpu_peak_gb", "peak", ".1f", " GB"), ("data_wait_s", "waiting", ".2f", " s"),
        )
        if record.get(key) is not None
    ]  # fmt: skip
    if remaining_s is not None:
        # In the burn-in the steps are cheaper than the later ones, so the estimate is a lower bound.
        sign = ">" if at_least else ""
        parts.append(f"ETA {sign}{int(remaining_s) // 60}:{int(remaining_s) % 60:02d}")
    return "  ".join(part.strip() for part in parts)
