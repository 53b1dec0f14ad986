"""A trace of a few steps by torch's profiler: what host and device did when, for a viewer (`run.profile`)."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from maskmatch_scale.files import disk_fault, writing
from maskmatch_scale.training.callbacks.base import Callback
from maskmatch_scale.training.run import Run
from maskmatch_scale.training.step import StepFigures


class Profile(Callback):
    """Writes `RUN/profile/rank-N.json.gz`, a Chrome trace, on every rank; does nothing unless `run.profile` is set.

    Profiling slows the steps down, and before and after them the host waits for the device. What happens between the
    steps (an evaluation, a checkpoint) is in the trace too. A run that continues within the steps profiles the rest.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._profiler: profile | None = None
        self._label: record_function | None = None
        self._steps: list[int] = []

    def before_step(self, step: int) -> None:
        """Start before the first of the steps, and label each of them."""
        wanted = self.run.recipe.run.profile
        if wanted is None or not wanted[0] <= step + 1 <= wanted[1]:
            return
        if self._profiler is None:
            activities = [ProfilerActivity.CPU]
            if self.run.runtime.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.synchronize(self.run.runtime.device)  # no kernels of the step before
            self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profiler.start()
        self._steps.append(step + 1)
        self._label = record_function(f"step {step + 1}")
        self._label.__enter__()  # type: ignore[no-untyped-call]

    def after_step(self, done: int, figures: StepFigures) -> None:
        """Write the trace after the last of the steps."""
        if self._label is not None:
            self._label.__exit__(None, None, None)
            self._label = None
        wanted = self.run.recipe.run.profile
        if wanted is not None and done == wanted[1]:
            if self.run.runtime.device.type == "cuda":
                torch.cuda.synchronize(self.run.runtime.device)  # kernels of the last step are in the trace, too
            self._write()

    def ended(self) -> None:
        """Write what there is, if an error ended the run within the steps, without waiting for the device."""
        try:
            self._write()
        except RuntimeError as error:  # the error that ended the run is the one to be seen
            self.run.say(f"warning: no profile was written: {error}")

    def _write(self) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        profiler, self._profiler = self._profiler, None
        path = self.run.folder.profile(self.run.runtime.rank)
        beside = path.with_name(f".{path.name}.writing")
        plain = beside.with_suffix(".json")
        try:
            with writing(path):
                path.parent.mkdir(exist_ok=True)
                # torch packs by way of a temporary file, elsewhere, and does not notice that it is cut off.
                profiler.export_chrome_trace(str(plain))
                _check_whole(plain)
                with plain.open("rb") as trace, gzip.open(beside, "wb") as packed:
                    shutil.copyfileobj(trace, packed)
                beside.replace(path)
        except OSError as error:  # nobody wants a run to end for its profile
            self.run.say(f"warning: no profile was written: {disk_fault(error) or error}")
            return
        finally:
            for left in (plain, plain.with_name(f"{plain.name}.tmp"), beside):  # the second one is the profiler's
                left.unlink(missing_ok=True)
        steps = f"steps {self._steps[0]} to {self._steps[-1]}"
        self.run.say(f"profile of {steps}: {path}; open it at https://ui.perfetto.dev or in chrome://tracing")


def _check_whole(trace: Path) -> None:
    """Raise an OSError if a trace is missing or cut off: the profiler only prints that it could not write."""
    if trace.is_file():
        with trace.open("rb") as file:
            file.seek(max(0, trace.stat().st_size - 16))
            if file.read().rstrip().endswith(b"}"):
                return
    trace.write_bytes(bytes(1 << 16))  # to be told the reason
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
