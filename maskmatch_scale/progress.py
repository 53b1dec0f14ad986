"""The progress of a command on stderr: a bar with the time left on a terminal or in a notebook, or lines in a log."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_DRAWINGS = 0.2
_NOTEBOOK_WIDTH = 80

Elsewhere = Literal["lines", "lines if slow", "last bar", "nothing"]
"""What is written if stderr is not a terminal. lines: one every ten seconds and one at the end. lines if slow: the
same, but nothing if the task takes less than ten seconds. last bar: the bar as it is at the end. nothing: nothing."""


class Advance(Protocol):
    """Counts steps that are done."""

    def __call__(self, steps: float = 1) -> None:
        """``steps`` more steps are done; parts of one count too, so that the time left is known within a long one."""


@contextmanager
def output_may_fail() -> Iterator[None]:
    """Go on without standard output if it cannot be written to while the body runs: a week's run must not end for it.

    The disk of the file it goes to may be full, or the terminal closed. From then on standard output goes nowhere.
    """
    try:
        yield
    except OSError as error:
        logging.getLogger("maskmatch_scale").warning("standard output is given up: %s", error.strerror)
        drop_output()


def drop_output() -> None:
    """Send standard output nowhere from now on, and with it what it could not write: Python tries again at the end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def show(text: str) -> None:
    """Print lines for people who watch a run. That they cannot be printed does not end it."""
    with output_may_fail():
        print(text, flush=True)  # noqa: T201


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose output is no terminal but can be replaced."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None else None
    # Colab's shell, and others, are subclasses of it.
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


class NotebookBar:
    """Shows a bar of rich below a notebook's cell, as text. rich's own way needs ipywidgets in kernel and browser.

    Args:
        bar: disabled, so that it draws nothing itself.
    """

    text = ""
    """A line below the bar."""

    def __init__(self, bar: Progress) -> None:
        from IPython import display

        show_below: Any = display.display  # which has no types
        self._bar, self._drawn = bar, time.monotonic()
        self._handle = show_below(self._drawing(), raw=True, display_id=True)

    def draw(self, *, at_once: bool = False) -> None:
        """Draw it as it is now, unless that was done a moment ago."""
        now = time.monotonic()
        if at_once or now - self._drawn >= _SECONDS_BETWEEN_DRAWINGS:
            self._drawn = now
            self._handle.update(self._drawing(), raw=True)

    def _drawing(self) -> dict[str, str]:
        from rich.console import Console

        drawn = io.StringIO()
        console = Console(file=drawn, width=_NOTEBOOK_WIDTH, force_jupyter=False, force_terminal=False)
        console.print(self._bar.get_renderable())
        return {"text/plain": f"{drawn.getvalue().strip()}\n{self.text}".rstrip()}


@contextmanager
def progress_of(
    task: str, total: int, *, unit: str, wanted: bool = True, elsewhere: Elsewhere = "lines"
) -> Iterator[Advance]:
    """Report how many steps of a task are done, while the body runs.

    Args:
        task: name of the task; empty if the unit says enough.
        total: number of steps.
        unit: what a step is, in the plural.
        wanted: False reports nothing.
        elsewhere: what is written if stderr is not a terminal.

    Yields:
        A function to call after each step, or with a number after several.
    """
    if not wanted:
        yield _nothing
    elif in_notebook() or sys.stderr.isatty() or elsewhere == "last bar":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        name = TextColumn("{task.description}", markup=False)
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # If stderr is not a terminal, rich draws the bar once, when it ends.
        with Progress(*columns, console=Console(stderr=True), disable=in_notebook()) as bar:
            number = bar.add_task(f"{task}, {unit}" if task else unit, total=total)
            below_cell = NotebookBar(bar) if in_notebook() else None

            def advance(steps: float = 1) -> None:
                bar.advance(number, steps)
                if below_cell is not None:
                    below_cell.draw()

            try:
                yield advance
            finally:
                if below_cell is not None:
                    below_cell.draw(at_once=True)
    elif elsewhere == "nothing":
        yield _nothing
    else:
        yield _Lines(task or unit, total, unit, end_of_quick_tasks=elsewhere == "lines")


def _nothing(steps: float = 1) -> None:
    pass


class _Lines:
    """A line every few seconds, and one when all steps are done."""

    def __init__(self, task: str, total: int, unit: str, *, end_of_quick_tasks: bool) -> None:
        self._task, self._total, self._unit, self._done = task, total, unit, 0.0
        self._say_the_end = end_of_quick_tasks
        self._began = self._said = time.monotonic()

    def __call__(self, steps: float = 1) -> None:
        self._done = round(self._done + steps, 9)  # a sum of parts must reach the total
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES or (self._done == self._total and self._say_the_end):
            self._said = now
            self._say_the_end = True
            rate = self._done / max(now - self._began, 1e-9)
            left = (self._total - self._done) / rate
            done = f"{self._done:.0f}" if self._done.is_integer() else f"{self._done:.2f}"
            sys.stderr.write(
                f"{self._task}: {done}/{self._total} {self._unit}, {rate:.1f} a second, {left:.0f} s left\n"
            )
            sys.stderr.flush()
