"""Exceptions that end a command with one line instead of a traceback."""


class UserError(ValueError):
    """A mistake of the user. The message is one line: the key, file, shard or sample, and what to do.

    The command line prints it without a traceback and exits with code 2. Any other exception is a bug of this package
    or of a library, and keeps its traceback.
    """

    on_all_ranks = False
    """Whether every rank of the job has found the mistake, so that only one of them prints it."""


RESUMABLE = 75
"""Exit code of a run that was stopped and goes on with `--resume auto`: EX_TEMPFAIL of sysexits.h."""


class TrainingStopped(RuntimeError):  # noqa: N818 - not an error of the program
    """The run stopped before its last step. The message says when, why, and from what it can be continued.

    Args:
        message: one line.
        exit_code: of the command: :data:`RESUMABLE` if the run only has to be started again.
    """

    on_all_ranks = True
    """Whether every rank of the job stops for this reason, so that only one of them prints it."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
