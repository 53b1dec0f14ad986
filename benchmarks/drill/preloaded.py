"""Ranks by fork from a process that has imported all that a run needs: they start in one second instead of ten.

For tests that have little time. Otherwise ranks are as those without a launcher.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

IMPORTS = ["benchmarks.drill.witness", "maskmatch_scale.training.loop", "deepspeed", "maskmatch_scale.record.report"]
_CONTEXT = multiprocessing.get_context("forkserver")


class Forked:
    """A rank, with the part of `subprocess.Popen` that a session needs. It and its children have a session id of their
    own, its process number: their environment, as the system shows it, is that of the process they were forked from.
    """

    def __init__(self, environment: Mapping[str, str], arguments: Sequence[str], log: Path) -> None:
        _CONTEXT.set_forkserver_preload(IMPORTS)
        self._process: BaseProcess = _CONTEXT.Process(target=_run, args=(dict(environment), list(arguments), str(log)))
        # The first start also starts the process that imports: libraries read these variables then.
        with mock.patch.dict(os.environ, environment):
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, or the negative number of a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """See `returncode`."""
        return self._process.exitcode

    def wait(self) -> None:
        """Wait for its end."""
        self._process.join()


def _run(environment: dict[str, str], arguments: list[str], log: str) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was started by itself
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "ab") as file, open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["maskmatch", *arguments]
    from benchmarks.drill.rank import run

    try:
        run()
    finally:
        atexit._run_exitfuncs()  # a forked process leaves these out
