"""Started by a launcher: train every recipe of a list, one after the other, in one process group.

A launch costs 10-20 s, another run in the same processes about one: so many configurations share a launch.
A job may have, beside its recipe: `resume`; `probe`, a file for the teacher's logits after the run; `without`, a guard
of `guards.py` that is taken away for it.
"""

import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from maskmatch_scale.recipe import parse_recipe
from maskmatch_scale.training import loop as train_module
from tests.distributed.guards import without
from tests.distributed.reference import probe_images


@contextlib.contextmanager
def probed(file):
    """After training every rank asks the teacher once; rank 0 keeps the answer."""
    plain = train_module._Run.train

    def train_and_probe(run, checkpoint):
        plain(run, checkpoint)
        logits = run.teacher(probe_images())
        if run.runtime.rank == 0:
            torch.save(logits, file)

    train_module._Run.train = train_and_probe
    yield
    train_module._Run.train = plain


# Pictures and pages are not what these runs are for.
train_module.write_report = lambda runs: "left out"

for job in json.loads(Path(sys.argv[1]).read_text()):
    with contextlib.ExitStack() as stack:
        if job.get("probe"):
            stack.enter_context(probed(job["probe"]))
        if job.get("without"):
            stack.enter_context(without(job["without"]))
        train_module.train(parse_recipe(job["recipe"]), job.get("resume"))
