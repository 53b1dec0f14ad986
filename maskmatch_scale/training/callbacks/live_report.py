"""Writes RUN/report.html again and again while the run goes on.

Decision: docs/decisions/0053-report-reloads-itself.md.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from contextlib import suppress

from maskmatch_scale.training.callbacks.base import Callback
from maskmatch_scale.training.run import Run

log = logging.getLogger("maskmatch_scale")

SHARE = 1 / 30
"""Most of a core's time that the reports may take."""
_ENDING_S = 5.0


class LiveReport(Callback):
    """Has rank 0 start a process that writes the report, at most one at a time, every `record.report_every_s`.

    Charts are drawn in Python for seconds, which in a thread would keep the steps from being launched. The page says
    how long the pause is: for the first report of a start `record.report_every_s`, then by what the last one took.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._every_s = run.recipe.record.report_every_s if run.runtime.rank == 0 else 0
        self._process: subprocess.Popen[str] | None = None
        self._began = time.monotonic()
        self._pause_s = float(self._every_s)
        self._failed = False

    def between_steps(self, done: int) -> None:
        """Start the process if it is due; nothing here waits for it."""
        if not self._every_s:
            return
        if self._process is not None and self._process.poll() is not None:
            self._collect(self._process)
            self._process = None
        if self._process is None and time.monotonic() - self._began >= self._pause_s:
            self._began = time.monotonic()
            self._process = self._start()

    def ended(self) -> None:
        """End the process, so that it does not replace the last report."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):  # it hangs on a network disk, as the run then may too
                self._process.communicate(timeout=_ENDING_S)

    def _start(self) -> subprocess.Popen[str] | None:
        arguments = [str(self.run.folder.path), f"{self._pause_s:.0f}"]
        command = [sys.executable, "-m", "maskmatch_scale.record.live", *arguments]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=environment,
            )
        except OSError as error:  # no memory or no process number is left, or the interpreter was removed
            self._warn(str(error))
            return None

    def _collect(self, process: subprocess.Popen[str]) -> None:
        printed, errors = process.communicate()
        if process.returncode:
            self._warn(errors.strip().rpartition("\n")[2])
            return
        try:
            self._pause_s = max(self._every_s, float(printed) / SHARE)
        except ValueError:
            self._warn(f"its process printed {printed[:200]!r} instead of its CPU time")

    def _warn(self, why: str) -> None:
        """Say once that reports cannot be written, on a full disk, for example. The run does not end for it."""
        if not self._failed:
            self._failed = True
            log.warning("the report on the run so far could not be written: %s", why)
