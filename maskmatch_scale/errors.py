"""Exceptions that end a command with one line instead of a traceback, and what others mean.

Their messages never hold a password or token of an address (`redact.py`): also those that are written into lists of
skipped samples, logs and files for other processes.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from maskmatch_scale.redact import redacted


class UserError(ValueError):
    """A mistake of the user. The message is one line: the key, file, shard or sample, and what to do.

    The command line prints it without a traceback and exits with code 2. Any other exception is a bug of this package
    or of a library, and keeps its traceback.
    """

    on_all_ranks = False
    """Whether every rank of the job has found the mistake, so that only one of them prints it."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class CommandFailed(RuntimeError):  # noqa: N818 - named after what it is about
    """A command could not do what it was asked for, and the user has made no mistake. The message is one line.

    The command line prints it without a traceback and exits with code 1.
    """

    exit_code = 1
    on_all_ranks = False

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


RESUMABLE = 75
"""Exit code of a run that was stopped and goes on with `--resume auto`: EX_TEMPFAIL of sysexits.h."""


class TrainingStopped(RuntimeError):  # noqa: N818 - not an error of the program
    """The run stopped before its last step. The message says when, why, and from what it can be continued.

    Args:
        message: one line.
        exit_code: of the command: :data:`RESUMABLE` if the run only has to be started again.
        on_all_ranks: whether every rank stops for this reason, so that only one of them prints it.
    """

    def __init__(self, message: str, exit_code: int = 1, *, on_all_ranks: bool = True) -> None:
        super().__init__(redacted(message))
        self.exit_code = exit_code
        self.on_all_ranks = on_all_ranks


class StartInterrupted(BaseException):
    """A signal came before the first step. `train` makes a :class:`TrainingStopped` of it.

    It may be raised wherever the main thread is, and is no `Exception`, so that code which takes any exception for a
    damaged image or for a model of a new kind does not catch it.

    Args:
        name: of the signal.
    """

    exit_code = RESUMABLE
    on_all_ranks = False

    def __init__(self, name: str) -> None:
        super().__init__(f"got {name} before the first step; nothing was trained in this start")


@contextmanager
def of_this_rank() -> Generator[None, None, None]:
    """Mark errors of the body as found by this rank alone, so that it prints them, whichever rank it is.

    Only ranks of a process group are known to the command line as such. Those of `maskmatch predict` have none.
    """
    try:
        yield
    except Exception as error:
        error.of_this_rank = True  # type: ignore[attr-defined]
        raise


def is_of_this_rank(error: Exception) -> bool:
    """Whether :func:`of_this_rank` has marked an error."""
    return getattr(error, "of_this_rank", False)


def is_of_lost_rank(error: BaseException) -> bool:
    """Whether this is gloo's error for a connection that another rank's process has closed."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("Connection closed by peer" in text or "Connection reset by" in text)
