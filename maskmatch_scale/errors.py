"""Exceptions that end a command with one line instead of a traceback, and what others mean.

Their messages never hold a password or token of an address (`redact.py`): also those that are written into lists of
skipped samples, logs and files for other processes.
"""

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


class TrainingStopped(RuntimeError):  # noqa: N818 - not an error of the program
    """The run stopped itself. The message says at which step, why, and from what it can be continued.

    Args:
        message: one line.
        on_all_ranks: whether every rank stops for this reason, so that only one of them prints it.
    """

    def __init__(self, message: str, *, on_all_ranks: bool = True) -> None:
        super().__init__(redacted(message))
        self.on_all_ranks = on_all_ranks


def is_of_lost_rank(error: BaseException) -> bool:
    """Whether this is gloo's error for a connection that another rank's process has closed."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("Connection closed by peer" in text or "Connection reset by" in text)
