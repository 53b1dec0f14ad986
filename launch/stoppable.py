"""Run a launcher so that a stop reaches the ranks, and not the launcher: `stoppable.py [--hosts A,B] COMMAND …`.

The launchers end themselves or their ranks when they get a signal: deepspeed kills a rank that has not ended within
30 seconds, its front process dies and leaves the job behind, and torchrun ends with code 1 whatever the ranks end with.
So the launcher gets a session of its own, which Ctrl-C does not reach. SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP (a
terminal that closes) become SIGUSR1 for the ranks, which write a checkpoint and end by themselves. The second SIGINT
kills the whole job. The exit code is the run's own (docs/stopping.md).

With --hosts the command is `deepspeed --hostfile`. Its ranks are not below it, because sshd has started them on these
hosts. They are told there (hosts.py).
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
from hosts import Hosts, outermost

LOOK_S = 0.2
AGAIN_S = 2.0
"""Seconds after which ranks are told again: one that has just begun cannot listen yet."""

arrived: list[int] = []


def main() -> int:
    """Run the command; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, _note)
    hosts, command = (Hosts(sys.argv[2]), sys.argv[3:]) if sys.argv[1] == "--hosts" else (None, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "exit-code"
        added = {"MASKMATCH_EXIT_CODE_FILE": str(file)} if hosts is None else hosts.environment(Path(folder))
        before = _ignore if hosts is None else _ignore_and_block
        with subprocess.Popen(command, env=os.environ | added, start_new_session=True, preexec_fn=before) as launcher:
            told, ranks_told = -AGAIN_S, set[int]()
            while launcher.poll() is None:
                if arrived.count(signal.SIGINT) > 1:
                    if hosts is not None:
                        hosts.tell("KILL")
                    _send(signal.SIGKILL, _started_by(launcher.pid))
                elif arrived and time.monotonic() - told >= AGAIN_S:
                    if hosts is not None:
                        hosts.tell("USR1")
                    else:
                        ranks = outermost(_started_by(launcher.pid), "RANK")
                        if file.exists() and ranks_told and ranks_told.isdisjoint(rank.pid for rank in ranks):
                            # Those that were told have ended. An elastic launcher starts others in their place.
                            launcher.terminate()
                        _send(signal.SIGUSR1, ranks)
                        ranks_told = ranks_told or {rank.pid for rank in ranks}
                    told = time.monotonic()
                with suppress(subprocess.TimeoutExpired):
                    launcher.wait(LOOK_S)
        code = _code_in(file) if hosts is None else hosts.exit_code()
        if arrived.count(signal.SIGINT) > 1:
            return 128 + signal.SIGINT
        if launcher.returncode == 0 and not arrived:
            # An elastic launcher may have started ranks again that had left a code.
            return 0
        if code is not None:
            return code
        return launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode


def _code_in(file: Path) -> int | None:
    code = file.read_text().strip() if file.exists() else ""
    return int(code) if code else None  # a rank may have been killed while it wrote


def _ignore() -> None:
    """In the launcher, which inherits it to the ranks until they listen."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _ignore_and_block() -> None:
    """In `deepspeed --hostfile`, pdsh and ssh, which have handlers of their own.

    slurm sends SIGTERM to all processes of a step. They would end, and the ranks on the other hosts with them.
    """
    _ignore()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _note(number: int, frame: FrameType | None) -> None:
    arrived.append(number)


def _started_by(number: int) -> list[psutil.Process]:
    """A process, and all that it and they have started."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(number)
        return [first, *first.children(recursive=True)]
    return []


def _send(number: int, processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
