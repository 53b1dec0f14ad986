"""Runs cells in processes, some at a time, within a time limit; says each minute how far they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.ablation.job import Job, read_result
from benchmarks.harness import ROOT, launch_environment, say

POLL_S = 0.2
MINUTE_S = 60.0
GRACE_S = 30.0
"""Seconds that a process which is to end gets for its checkpoint."""


@dataclass
class Cell:
    """A cell and how it goes."""

    job: Job
    folder: Path
    weight: float
    """Its share of the work, in any unit: what the time left is estimated by."""
    status: str = "waiting"
    """waiting, running, done, failed, left out."""
    reason: str = ""
    """Why it failed."""
    before: float = 0.0
    """Share that earlier starts have done."""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Arm and draw, in words."""
        return f"{self.job.arm}, draw {self.job.draw}"

    def share(self) -> float:
        """How much of it is done, 0–1."""
        if self.status == "done":
            return 1.0
        try:
            done, steps = (self.folder / "progress").read_text(encoding="utf-8").split()
        except (OSError, ValueError):
            return 0.0
        return int(done) / max(1, int(steps))


def run_cells(cells: Sequence[Cell], jobs: int, device: str, minutes: float | None) -> None:
    """Run cells in their order, ``jobs`` at a time; their `status` says how each has ended.

    Finished ones are left as they are. When the time is over those that still run are ended, with a checkpoint if they
    have any; so are all of them if this process is interrupted.

    Args:
        cells: with their jobs written.
        jobs: processes at a time.
        device: cpu or cuda.
        minutes: limit of all together; None: none.
    """
    began = time.monotonic()
    for cell in cells:
        cell.status = "waiting" if read_result(cell.folder) is None else "done"
        cell.before = cell.share()
    ends_at = None if minutes is None else began + 60 * minutes
    told = began
    try:
        while any(cell.status in {"waiting", "running"} for cell in cells):
            now = time.monotonic()
            if ends_at is not None and now >= ends_at:
                break
            _advance(cells, jobs, device)
            if now - told >= MINUTE_S:
                told = now
                say(progress_line(cells, now - began))
            time.sleep(POLL_S)
    finally:
        _end([cell for cell in cells if cell.status == "running"])
        for cell in cells:
            if cell.status in {"waiting", "running"}:
                cell.status = "done" if read_result(cell.folder) is not None else "left out"
    say(progress_line(cells, time.monotonic() - began))


def _advance(cells: Sequence[Cell], jobs: int, device: str) -> None:
    """See which have ended, and start as many."""
    for cell in cells:
        if cell.process is not None and cell.status == "running" and cell.process.poll() is not None:
            _ended(cell)
    running = sum(cell.status == "running" for cell in cells)
    for cell in [cell for cell in cells if cell.status == "waiting"][: jobs - running]:
        _start(cell, device)


def _start(cell: Cell, device: str) -> None:
    environment = launch_environment(torch.device(device))
    environment |= dict.fromkeys(("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with (cell.folder / "log.txt").open("ab") as log:
        # A session of its own: Ctrl-C comes to this process alone, which then ends it with its loader processes.
        cell.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ablation.cell", str(cell.folder / "job.json")],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    cell.status = "running"


def _ended(cell: Cell) -> None:
    assert cell.process is not None
    code = cell.process.returncode
    if code == 0 and read_result(cell.folder) is not None:
        cell.status = "done"
        say(f"done: {cell.name}")
        return
    cell.status, cell.reason = "failed", f"exit code {code}: {last_line(cell.folder / 'log.txt')}"
    say(f"failed: {cell.name}: {cell.reason}")


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _end(cells: Sequence[Cell]) -> None:
    """Ask processes to stop, wait for their checkpoints, and end what is still there of their sessions."""
    _signal(cells, signal.SIGTERM)
    ends_at = time.monotonic() + GRACE_S
    for cell in cells:
        assert cell.process is not None
        try:
            cell.process.wait(max(0.0, ends_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            continue
    _signal(cells, signal.SIGKILL)
    for cell in cells:
        assert cell.process is not None
        cell.process.wait()


def _signal(cells: Sequence[Cell], number: signal.Signals) -> None:
    for cell in cells:
        assert cell.process is not None
        try:
            os.killpg(cell.process.pid, number)
        except ProcessLookupError:
            continue


def progress_line(cells: Sequence[Cell], elapsed_s: float) -> str:
    """How many are done, what runs, and the time left by what was done since the start."""
    counts = {status: [cell for cell in cells if cell.status == status] for status in ("done", "running", "failed")}
    shares = {id(cell): cell.share() for cell in cells}
    done = sum(cell.weight * max(0.0, shares[id(cell)] - cell.before) for cell in cells)
    open_cells = [cell for cell in cells if cell.status in {"waiting", "running"}]
    left = sum(cell.weight * (1 - shares[id(cell)]) for cell in open_cells)
    line = f"{_clock(elapsed_s)}: {len(counts['done'])}/{len(cells)} cells done"
    if counts["failed"]:
        line += f", {len(counts['failed'])} failed"
    if counts["running"]:
        some = [f"{cell.name} {shares[id(cell)]:.0%}" for cell in counts["running"]]
        line += f"; running: {'; '.join(some[:4])}{' …' if len(some) > 4 else ''}"
    if open_cells:
        line += f"; about {_clock(elapsed_s * left / done)} left" if done else "; time left not known yet"
    return line


def _clock(seconds: float) -> str:
    whole = int(seconds)
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole // 60 % 60:02d}:{whole % 60:02d}"
