"""Running one case in a process of its own: with a line a minute, and an end when its time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.cases import Case
from benchmarks.harness import ROOT

GRACE_S = 10.0
"""Seconds between asking a process to end and ending it."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    status: str
    """written, cut off, failed, or left out."""
    seconds: float
    reason: str | None = None
    """Why it is not whole."""


def run_case(case: Case, device: str, out: Path, limit_s: float, minute: Callable[[float], None]) -> Outcome:
    """Run a case until it ends, or for ``limit_s`` seconds; what it wrote until then is kept.

    Args:
        case: what to run.
        device: cpu or cuda.
        out: JSON file that it writes.
        limit_s: seconds after which its processes are ended.
        minute: called every minute with the seconds since its start.
    """
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{case.benchmark}", "--out", str(out), *case.options(device)]
    began = time.monotonic()
    # A session of its own, so that the ranks which the benchmark starts end with it.
    process = subprocess.Popen(command, cwd=ROOT, env=_environment(device), stdout=sys.stderr, start_new_session=True)
    try:
        code = _wait(process, began, limit_s, minute)
    finally:
        _end(process)
    seconds = time.monotonic() - began
    kept = "what it measured until then is kept" if out.is_file() else "nothing was written"
    if code is None:
        return Outcome("cut off", seconds, f"after {limit_s:.0f} s; {kept}")
    if code:
        return Outcome("failed", seconds, f"exit code {code}; {kept}")
    return Outcome("written", seconds)


def _environment(device: str) -> dict[str, str]:
    """This process's, without the variables of a launcher that it may run under; on a CPU GPUs are hidden."""
    own = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in own}
    return kept | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def _wait(
    process: subprocess.Popen[bytes], began: float, limit_s: float, minute: Callable[[float], None]
) -> int | None:
    """Exit code of the process; None if it still runs when its time is over."""
    minutes = 0
    while True:
        spent = time.monotonic() - began
        if spent >= limit_s:
            return None
        try:
            return process.wait(min(limit_s - spent, 60 * (minutes + 1) - spent))
        except subprocess.TimeoutExpired:
            if time.monotonic() - began >= 60 * (minutes + 1):
                minutes += 1
                minute(time.monotonic() - began)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the processes of its session that are still there."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
