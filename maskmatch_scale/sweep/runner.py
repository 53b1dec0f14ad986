"""Starts the runs of a sweep, and passes signals on to the one that is under way."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from maskmatch_scale.errors import RESUMABLE, UserError

LOOK_S = 0.2
"""Seconds between two looks at the run that is under way."""
_MODULE = {"deepspeed": "--module", "torchrun": "-m", "accelerate": "--module"}
"""Launchers, and their option for a module of Python."""
_PR_SET_PDEATHSIG = 1
"""prctl(2): which signal a process gets when the one that has started it ends."""


def train_command(launcher: Sequence[str]) -> list[str]:
    """What comes before the recipe."""
    if not launcher:
        return [sys.executable, "-m", "maskmatch_scale", "train"]
    option = _MODULE.get(Path(launcher[0]).name)
    if option is None or "train" in launcher:
        return list(launcher)
    return [*launcher, option, "maskmatch_scale", "train"]


class Runner:
    """Starts runs, and passes the signals that this process gets on to the one that is under way, each once.

    A run gets a session of its own: what a terminal sends at Ctrl-C would reach it directly too, and two of them end a
    run without a checkpoint. If this process is killed, the run gets a SIGTERM (on Linux).

    Args:
        names: of signals, besides those that end a program at the terminal's or the system's will.
    """

    def __init__(self, names: Sequence[str]) -> None:
        numbers = {signal.SIGINT, signal.SIGTERM, *(getattr(signal, name) for name in names)}
        # `nohup` ignores the end of the terminal for this process and all that it starts. A shell without a terminal
        # ignores Ctrl-C for what it starts in the background; `maskmatch train` listens to it all the same.
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.add(signal.SIGHUP)
        self._numbers = list(numbers)
        self.arrived: list[signal.Signals] = []

    def __enter__(self) -> Runner:
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
                child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_ends_with_us())
            except OSError as error:
                raise UserError(f"--launcher: {command[0]} cannot be started: {error.strerror}") from None
            told = 0
            while child.poll() is None:
                for number in self.arrived[told:]:
                    _send(child, number, launcher=Path(command[0]).name in _MODULE)
                    told += 1
                with suppress(subprocess.TimeoutExpired):
                    child.wait(LOOK_S)
            code = child.returncode
            if code and file.exists():
                return int(file.read_text())
            return code if code >= 0 else 128 - code


def _ends_with_us() -> Callable[[], None] | None:
    """What a child does before it becomes the run: it asks for a SIGTERM when this process ends, even by SIGKILL.

    None where there is no prctl.
    """
    if sys.platform != "linux":
        return None
    prctl, us = ctypes.CDLL(None).prctl, os.getpid()  # found here: a child must not load libraries

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != us:  # it ended in between
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def _send(child: subprocess.Popen[bytes], number: signal.Signals, *, launcher: bool) -> None:
    """Pass a signal on. Of deepspeed, torchrun and accelerate not to them but to what they have started.

    SIGUSR1 kills these launchers, and SIGTERM kills `deepspeed`, which leaves its job behind. The process below
    `deepspeed` does not know SIGUSR1 either: so all but Ctrl-C are sent as SIGTERM.
    """
    below = _children(child.pid) if launcher else []
    for process in below:
        with suppress(ProcessLookupError):
            os.kill(process, number if number == signal.SIGINT else signal.SIGTERM)
    if not below:
        child.send_signal(number)


def _children(process: int) -> list[int]:
    """Numbers of the processes that a process has started; none where the system does not tell."""
    found: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # the thread has just ended
            found += map(int, file.read_text().split())
    return found
