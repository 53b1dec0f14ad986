"""The processes that measure, as the command sees them: requests go out, answers come back, a line of JSON each."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from benchmarks.harness import ROOT

ANSWER_S = 240
"""Seconds after which a loader counts as hung."""


class FailedError(RuntimeError):
    """A worker could not do what it was asked to do."""


class Worker:
    """A process that measures: `benchmarks.loader.worker`."""

    def __init__(self, python: str) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.loader.worker"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, what: str, **request: Any) -> Any:
        """The result of a request.

        Raises:
            FailedError: what went wrong in the worker.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"what": what, **request}) + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], ANSWER_S)
            if not ready:
                raise FailedError(f"no answer in {ANSWER_S} s")
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise FailedError("the process ended")
        answer = json.loads(line)
        if "error" in answer:
            raise FailedError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the process and wait until it has ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
                process.kill()
            self.process.wait()


@contextmanager
def running(python: str) -> Iterator[Worker]:
    """A worker under an interpreter, ended after the ``with``."""
    worker = Worker(python)
    try:
        yield worker
    finally:
        worker.close()
