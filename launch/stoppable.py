"""Run a launcher so that a stop reaches the ranks, and not the launcher: `stoppable.py COMMAND …`.

The launchers end themselves or their ranks when they get a signal: deepspeed kills a rank that has not ended within
30 seconds, its front process dies and leaves the job behind, and torchrun ends with code 1 whatever the ranks end with.
So the launcher gets a session of its own, which Ctrl-C does not reach. SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP (a
terminal that closes) become SIGUSR1 for the ranks, which write a checkpoint and end by themselves. The second SIGINT
kills the whole job. The exit code is the run's own (docs/stopping.md).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

LOOK_S = 0.2
AGAIN_S = 2.0
"""Seconds after which ranks are told again: one that has just begun cannot listen yet."""

arrived: list[int] = []


def main() -> int:
    """Run the command; returns the exit code."""
    # The launcher inherits it, and so does a rank until it listens.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "exit-code"
        environment = os.environ | {"MASKMATCH_EXIT_CODE_FILE": str(file)}
        with subprocess.Popen(sys.argv[1:], env=environment, start_new_session=True) as launcher:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it
                    signal.signal(number, _note)
            told = -AGAIN_S
            while launcher.poll() is None:
                if arrived.count(signal.SIGINT) > 1:
                    _send(signal.SIGKILL, _started_by(launcher.pid))
                elif arrived and time.monotonic() - told >= AGAIN_S:
                    _send(signal.SIGUSR1, _ranks(_started_by(launcher.pid)))
                    told = time.monotonic()
                with suppress(subprocess.TimeoutExpired):
                    launcher.wait(LOOK_S)
        if arrived.count(signal.SIGINT) > 1:
            return 128 + signal.SIGINT
        if file.exists():
            return int(file.read_text())
        return launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode


def _note(number: int, frame: FrameType | None) -> None:
    arrived.append(number)


def _started_by(number: int) -> list[psutil.Process]:
    """A process, and all that it and they have started."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(number)
        return [first, *first.children(recursive=True)]
    return []


def _ranks(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that a launcher has made ranks: the outermost that have a variable RANK."""
    with_rank = set()
    for process in processes:
        with suppress(psutil.Error):
            if "RANK" in process.environ():
                with_rank.add(process.pid)
    return [process for process in processes if process.pid in with_rank and process.ppid() not in with_rank]


def _send(number: int, processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
