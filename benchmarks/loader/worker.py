"""A process that measures loaders: each line of its standard input is a request in JSON, answered by a line.

Runs under this interpreter, or under the one of an environment that has litdata and mosaicml-streaming.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO

import psutil
import torch

from benchmarks.loader.task import Task
from benchmarks.loader.variants import VARIANTS, write_peer


def cpu_seconds() -> float:
    """CPU seconds of this process, of children that have ended, and of those that run (these to 10 ms each)."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(variant: str, task: Task, warm: int, count: int, paced: int, step_s: float) -> dict[str, Any]:
    """Take batches as fast as they come, then at the pace of a training step.

    Args:
        variant: one of `VARIANTS`.
        task: what it does.
        warm: batches before those that count; with 0 the start of the loader counts too.
        count: batches that count.
        paced: batches of the second part.
        step_s: seconds that the consumer sleeps after each of these.

    Returns:
        CPU seconds and wall seconds of the first part, and the share of the second part that the consumer waited.
    """
    cpu, wall = cpu_seconds(), time.perf_counter()
    iterator = iter(VARIANTS[variant](task))
    for _ in range(warm):
        next(iterator)
    if warm:
        cpu, wall = cpu_seconds(), time.perf_counter()
    for _ in range(count):
        batch = next(iterator)
    wall = time.perf_counter() - wall
    cpu = cpu_seconds() - cpu
    if batch is not None:
        images, valid = _tensors(batch)
        assert images.shape == (task.batch, 3, task.crop_px, task.crop_px)
        assert valid.shape == (task.batch, task.crop_px, task.crop_px)
    waited, begin = 0.0, time.perf_counter()
    for _ in range(paced):
        asked = time.perf_counter()
        next(iterator)
        waited += time.perf_counter() - asked
        time.sleep(step_s)
    share = waited / (time.perf_counter() - begin) if paced else None
    if hasattr(iterator, "close"):
        iterator.close()
    del iterator, batch
    gc.collect()
    return {"cpu_s": cpu, "wall_s": wall, "waiting": share}


def _tensors(batch: Any) -> Any:
    return batch if isinstance(batch, (tuple, list)) else (batch.unlabelled_images, batch.unlabelled_valid)


def _versions(*names: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def answer(request: dict[str, Any]) -> Any:
    """The result of a request."""
    what, given = request.pop("what"), request.pop("task", None)
    if what == "versions":
        return _versions(*request["names"])
    if what == "write":
        return write_peer(**request)
    task = Task(**{**given, "shards": tuple(given["shards"])})
    if what == "measure":
        return measure(task=task, **request)
    from benchmarks.loader import stream

    return getattr(stream, what)(task, **request)


def main() -> None:
    """Answer requests until standard input ends. What libraries print goes to standard error."""
    answers: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            result = {"result": answer(json.loads(line))}
        except Exception as error:  # reported to the process that asked
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
