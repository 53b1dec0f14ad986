"""The processes of other ranks, as far as the operating system shows them: those on the same machine."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_STARTED = 19
"""Place of the start in what `/proc/PID/stat` has after the name (proc(5), field 22)."""
_IMPORTED = time.monotonic()

State = Literal["running", "stopped", "ended", "unknown"]
"""Of a process. unknown: it is on another machine, or in another container."""


@dataclass(frozen=True)
class Process:
    """A process, named so that others can find it."""

    number: int
    space: str
    """Which machine and container the number is of: processes with the same text see each other."""
    started: int | None = None
    """When it was started, in ticks of the kernel's clock: numbers are used again. None: not known."""

    @classmethod
    def own(cls) -> Process:
        """This process."""
        try:
            text = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
            started = int(text.rpartition(")")[2].split()[_STARTED])
        except OSError:  # not Linux
            started = None
        return cls(os.getpid(), _space(), started)

    @property
    def is_near(self) -> bool:
        """Whether it can be seen from this process."""
        return self.space == _space()

    @property
    def state(self) -> State:
        """What it does now."""
        if not self.is_near:
            return "unknown"
        try:
            text = Path(f"/proc/{self.number}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "ended"
        fields = text.rpartition(")")[2].split()
        if self.started is not None and int(fields[_STARTED]) != self.started:
            return "ended"  # and its number was given to another process
        return "ended" if fields[0] in "ZX" else "stopped" if fields[0] in "Tt" else "running"

    @property
    def age_s(self) -> float:
        """Seconds since it started; of a process that cannot be seen, since this package was imported."""
        if self.started is None or not self.is_near:
            return time.monotonic() - _IMPORTED
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.started / os.sysconf("SC_CLK_TCK")


class Ends:
    """Waits for the ends of processes that are near; on a system without `pidfd_open` they never come.

    Args:
        processes: by rank.
    """

    def __init__(self, processes: Mapping[int, Process]) -> None:
        self._woken, self._waker = os.pipe()
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        self._ranks: dict[int, int] = {}
        for rank, process in processes.items():
            if process.is_near:
                with suppress(OSError, AttributeError):
                    self._ranks[os.pidfd_open(process.number)] = rank
        for handle in self._ranks:
            self._poll.register(handle, select.POLLIN)

    def wait(self, seconds: float) -> list[int]:
        """Wait until a process ends, :meth:`wake` is called, or the time is over; returns the ranks that have ended."""
        handles = [handle for handle, _ in self._poll.poll(1000 * seconds) if handle != self._woken]
        ended = []
        for handle in handles:
            self._poll.unregister(handle)
            os.close(handle)
            ended.append(self._ranks.pop(handle))
        return ended

    def wake(self) -> None:
        """Let :meth:`wait` return, now and from now on."""
        os.write(self._waker, b".")

    def close(self) -> None:
        """Close the handles of the processes."""
        for handle in (self._woken, self._waker, *self._ranks):
            os.close(handle)


def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux: other processes are not looked at
        return f"{socket.gethostname()} {os.getpid()}"
