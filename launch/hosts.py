"""The ranks of `deepspeed --hostfile`: told, and asked for their exit code, on each of its hosts.

    hosts.py tell JOB SIGNAL    on a host: send a signal to the job's ranks there
    hosts.py code JOB           on a host: print the exit code that a rank there has left, and remove it

Hosts are reached as deepspeed reaches them, by pdsh and ssh. This file and this Python must be at the same paths there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

JOB = "MASKMATCH_JOB"
"""Environment variable that all ranks of a job have, with its name."""
_PASSED_ON = ("OMP_NUM_THREADS", "DS_ACCELERATOR", JOB, "MASKMATCH_EXIT_CODE_FILE")
_RESUMABLE = 75
_ANSWER_S = 60.0
"""Seconds for all hosts to answer."""


class Hosts:
    """The hosts of one job.

    Args:
        names: as pdsh takes them, with commas.
    """

    def __init__(self, names: str) -> None:
        self._names = names
        self._job = uuid.uuid4().hex

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables for deepspeed, which passes those on to all ranks that a file names.

        Args:
            folder: where this file is written. deepspeed reads it in place of the user's own, whose lines it has too.
        """
        added = {JOB: self._job, "MASKMATCH_EXIT_CODE_FILE": str(_code_file(self._job))}
        everything = os.environ | added
        lines = [f"{name}={everything[name]}" for name in _PASSED_ON if name in everything]
        name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        for place in (Path.home(), Path()):  # where deepspeed looks
            if (place / name).is_file():
                lines += [line for line in (place / name).read_text().splitlines() if "=" in line]
        file = folder / "environment"
        file.write_text("".join(f"{line}\n" for line in dict.fromkeys(lines)))
        return added | {"DS_ENV_FILE": str(file)}

    def tell(self, name: str) -> None:
        """Send a signal, such as USR1, to the ranks on all hosts that can be reached."""
        self._run("tell", self._job, name)

    def exit_code(self) -> int | None:
        """What the run has ended with; None if no rank has left a code.

        If hosts have different ones, a rank has met an error while others could stop with a checkpoint: the error's.
        """
        codes = {int(line) for line in self._run("code", self._job).split()}
        return max(codes, key=lambda code: code != _RESUMABLE) if codes else None

    def _run(self, *words: str) -> str:
        command = ["pdsh", "-N", "-R", "ssh", "-w", self._names, sys.executable, str(Path(__file__).resolve()), *words]
        with suppress(subprocess.TimeoutExpired):
            return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_ANSWER_S, check=False).stdout
        return ""


def _code_file(job: str) -> Path:
    return Path(tempfile.gettempdir()) / f"maskmatch-{job}.code"


def outermost(processes: Sequence[psutil.Process], variable: str) -> list[psutil.Process]:
    """Of some processes those that have a variable in their environment, without those that they have started."""
    have = {process.pid for process in processes if variable in _environment(process)}
    return [process for process in processes if process.pid in have and process.ppid() not in have]


def _environment(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error):
        return process.environ()
    return {}


def main() -> int:
    """What runs on a host."""
    what, job = sys.argv[1:3]
    if what == "tell":
        number = signal.Signals[f"SIG{sys.argv[3]}"]
        of_job = [process for process in psutil.process_iter() if _environment(process).get(JOB) == job]
        for rank in outermost(of_job, "RANK"):
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
    elif _code_file(job).is_file():
        print(_code_file(job).read_text().strip())
        _code_file(job).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
