"""Exceptions that end a command with one line instead of a traceback, and what others mean."""


class UserError(ValueError):
    """A mistake of the user. The message is one line: the key, file, shard or sample, and what to do.

    The command line prints it without a traceback and exits with code 2. Any other exception is a bug of this package
    or of a library, and keeps its traceback.
    """

    on_all_ranks = False
    """Whether every rank of the job has found the mistake, so that only one of them prints it."""


class TrainingStopped(RuntimeError):  # noqa: N818 - not an error of the program
    """The run stopped itself. The message says at which step, why, and from what it can be continued."""


def is_of_lost_rank(error: BaseException) -> bool:
    """Whether this is gloo's error for a connection that another rank's process has closed."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("Connection closed by peer" in text or "Connection reset by" in text)
