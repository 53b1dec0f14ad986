"""What ends a command with one line instead of a traceback."""


class UserError(ValueError):
    """Something the user gave is wrong: one line that names key, file, shard or sample, and what to do.

    The command line prints it without a traceback and exits with code 2. Any other exception is a bug of ours, or of a
    library's, and keeps its traceback.
    """

    on_all_ranks = False
    """Whether every rank of the job has found it, so that one of them tells."""


class TrainingStopped(RuntimeError):  # noqa: N818 - not an error of the program
    """The run stopped itself; the message says at which step, why, and what it can be continued from."""
