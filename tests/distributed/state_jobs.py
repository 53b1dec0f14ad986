"""Started by a launcher, or called: train the toy of `tests/engine/state.py` in segments that continue each other.

A segment has a `name`, a `recipe`, `steps`, and, if it continues another one, `after`: the name of that one. Files of a
segment, in a folder of its name: the pieces that each rank gave after restoring (`start-R.pt`) and after its steps
(`end-R.pt`); `progress.json`; and what rank R saw (`seen-R.json`): losses, elements read, the teacher's logits. With
`more` it goes on for as many steps (`more-R.pt`, `more_losses`).
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from maskmatch_scale.checkpoints.pieces import Piece
from maskmatch_scale.engine import setup
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.recipe import parse_recipe
from tests.engine.state import Job, Stored


def stored_in(folder, when):
    """The state that all ranks of a segment gave."""
    return Stored(Piece(*values) for file in sorted(folder.glob(f"{when}-*.pt")) for values in torch.load(file))


def run(segments, folder):
    """Run segments one after the other, in one process group."""
    for segment in segments:
        recipe = parse_recipe(segment["recipe"])
        runtime = setup.start(Place.from_environment(), recipe.engine)
        own = folder / segment["name"]
        own.mkdir(exist_ok=True)
        job, first, seen = Job(recipe, runtime), 0, {}
        if "after" in segment:
            before = folder / segment["after"]
            progress = json.loads((before / "progress.json").read_text())
            stored = stored_in(before, "end")
            job.restore(stored, progress)
            first, seen["read"] = progress["optimizer_step"], stored.elements_read
            _keep(job, own, "start")
        seen["losses"] = job.train(first, segment["steps"])
        _keep(job, own, "end")
        if runtime.rank == 0:
            (own / "progress.json").write_text(json.dumps(job.engine.progress()))
        if segment.get("more"):
            seen["more_losses"] = job.train(first + segment["steps"], segment["more"])
            _keep(job, own, "more")
        seen["logits"] = job.logits().tolist()
        (own / f"seen-{runtime.rank}.json").write_text(json.dumps(seen))
        runtime.barrier()


def _keep(job, folder, when):
    pieces = [(piece.name, piece.shape, piece.start, piece.values) for piece in job.pieces()]
    torch.save(pieces, folder / f"{when}-{job.runtime.rank}.pt")


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    assert os.environ["WORLD_SIZE"] == "2"
