"""Started by a launcher: train recipes one after the other, and let something stop each of them on one rank.

A job has, beside its recipe and `resume`: `rank` and `step` of the stop, and what it is: `signal`, a name; `ask`, an
exit code; `evaluation`, true if the signal comes while images are evaluated after the step. Every rank writes down how
each run ended.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from maskmatch_scale.errors import TrainingStopped, UserError
from maskmatch_scale.recipe import parse_recipe
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback, closing


class Stopped(Callback):
    """Stops the run as the job says."""

    def __init__(self, run, job):
        super().__init__(run)
        self._job = job if job.get("rank") == run.runtime.rank else {}
        self._done = 0

    def started(self):
        if self._job.get("evaluation"):
            self.run.teacher.module.register_forward_pre_hook(lambda *_: self._forward())

    def _forward(self):
        if self._done == self._job["step"]:
            self._stop()

    def before_step(self, step):
        self._done = 0
        if step + 1 == self._job.get("step") and not self._job.get("evaluation"):
            self._stop()

    def after_step(self, done, figures):
        self._done = done

    def _stop(self):
        if "ask" in self._job:
            self.run.ask_to_stop("seen enough", self._job["ask"])
        else:
            os.kill(os.getpid(), getattr(signal, self._job["signal"]))
        while not self.run.agreement.wanted:
            time.sleep(0.001)


closing.write_report = lambda runs: "left out"

ends = []
for job in json.loads(Path(sys.argv[1]).read_text()):
    try:
        train(parse_recipe(job["recipe"]), job.get("resume"), callbacks=[lambda run, job=job: Stopped(run, job)])
        ends.append(["finished", 0])
    except TrainingStopped as error:
        ends.append([str(error), error.exit_code])
    except UserError as error:
        ends.append([str(error), "on all ranks" if error.on_all_ranks else "on this rank"])
Path(sys.argv[1]).with_name(f"ends-{os.environ['RANK']}.json").write_text(json.dumps(ends))
