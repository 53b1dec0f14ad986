"""Signals that stop a run, received in the main thread and handled in a thread of their own.

What the interpreter does when a signal arrives is write its number to a pipe, at once. Python's own handlers run only
when the main thread is back in Python code, and it may be waiting for a device or another rank. So a thread reads the
pipe: it counts, prints a line, and tells the run. The handlers do nothing, except before the first step
(:meth:`Signals.keep`): there is nothing to save yet, so they end the start.

Nothing large is imported here: `maskmatch train` listens before it imports torch.

Decision: docs/decisions/0046-ranks-agree-to-stop.md.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from maskmatch_scale.errors import StartInterrupted, TrainingStopped

INTERRUPTED = 130
"""Exit code after a second Ctrl-C, as shells report it."""

_current: Signals | None = None


class Signals:
    """Listens to signals from its creation until :meth:`close`; in the main thread alone.

    Args:
        names: signals that stop a run: `run.stop_signals`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers = [getattr(signal, name) for name in names]
        self._tell: Callable[[str], None] | None = None
        self._first: str | None = None
        self._interrupts = 0  # counted by the thread
        self._handled = 0  # the same by the main thread, without the one that ended the start
        self._raised = False
        self._process = os.getpid()
        self._asking = threading.Lock()
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._pipe = write
        self._fd_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in self._numbers}
        self._thread = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        self._thread.start()

    def keep(self, tell: Callable[[str], None]) -> None:
        """From now on signals do not end the start, but are told to a function, in this object's thread.

        Args:
            tell: is given the name of the first signal, also if it came before.
        """
        with self._asking:
            self._tell = tell
            if self._first is not None:
                tell(self._first)

    def close(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._pipe)
        self._thread.join()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self._tell is None and not self._raised:
            self._raised = True  # another signal must not interrupt the end
            raise StartInterrupted(signal.Signals(number).name)
        self._handled += number == signal.SIGINT
        if self._handled > 1 and _in_session():
            raise KeyboardInterrupt

    def _listen(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in self._numbers:
                    self._arrived(signal.Signals(number))
        os.close(pipe)

    def _arrived(self, which: signal.Signals) -> None:
        self._interrupts += which == signal.SIGINT
        if self._interrupts > 1 and not _in_session():
            os.write(2, b"\nmaskmatch: interrupted a second time: ended without a checkpoint\n")
            os._exit(INTERRUPTED)
        with self._asking:
            if self._first is None:
                self._first = which.name
                if self._tell is not None:
                    self._tell(which.name)


def _in_session() -> bool:
    """Whether somebody works in this process: a notebook, IPython or Python's own prompt, which must not end.

    All of them set `sys.ps1`. There a second Ctrl-C ends the run, in the main thread, and not the process.
    """
    return hasattr(sys, "ps1")


@contextmanager
def listening(names: Sequence[str]) -> Generator[Signals | None, None, None]:
    """Listen while the body runs; to what is listened to already, if anything (:func:`listen`).

    Yields:
        None outside the main thread, where Python receives no signals.

    Raises:
        TrainingStopped: a signal came before :meth:`Signals.keep`.
    """
    begins = _current is None and threading.current_thread() is threading.main_thread()
    try:
        if begins:
            listen(names)
        yield _current
    except StartInterrupted as interrupted:
        raise TrainingStopped(str(interrupted), interrupted.exit_code, on_all_ranks=interrupted.on_all_ranks) from None
    finally:
        if begins:
            stop_listening()


def listen(names: Sequence[str]) -> None:
    """Listen until :func:`stop_listening`, or until the process ends.

    A launcher sends SIGTERM to all ranks when the first has ended; those that are about to print their last line must
    not die of it.
    """
    global _current
    _current = Signals(names)


def stop_listening() -> None:
    """Put the handlers back that were there before, if they were changed."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


def _in_child(*_: Any) -> None:
    # A forked child has the pipe of its parent: what it gets is not for its parent.
    if _current is not None:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_in_child)
