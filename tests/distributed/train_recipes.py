"""Started by a launcher: train every recipe of a list, one after the other, in one process group.

A launch costs 10-20 s, another run in the same processes about one: so many configurations share a launch.
A job may have, beside its recipe: `resume`; `probe`, a file for the teacher's logits after the run; `without`, a guard
of `guards.py` that is taken away for it; `built`, how its model is built (`building.py`).
"""

import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from maskmatch_scale.recipe import parse_recipe
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback, closing
from tests.distributed.building import built
from tests.distributed.guards import without
from tests.distributed.reference import probe_images


class Probe(Callback):
    """After training every rank asks the teacher once; rank 0 keeps the answer in a file."""

    file = None

    def finished(self):
        logits = self.run.teacher(probe_images())
        if self.run.runtime.rank == 0:
            torch.save(logits, self.file)


# Pictures and pages are not what these runs are for.
closing.write_report = lambda runs: "left out"

for job in json.loads(Path(sys.argv[1]).read_text()):
    with contextlib.ExitStack() as stack:
        Probe.file = job.get("probe")
        if job.get("without"):
            stack.enter_context(without(job["without"]))
        if job.get("built"):
            stack.enter_context(built(job["built"]))
        train(parse_recipe(job["recipe"]), job.get("resume"), callbacks=[Probe] if Probe.file else [])
