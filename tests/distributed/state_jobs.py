"""Started by a launcher, or called: train the toy of `tests/engine/state.py` in segments that continue each other.

A segment has a `name`, a `recipe`, `steps`, and, if it continues another one, `after`: the name of that one. Files of a
segment, in a folder of its name: the pieces that each rank gave after restoring (`start-R.pt`) and after its steps
(`end-R.pt`); `progress.json`; and what rank R saw (`seen-R.json`): losses, elements read, the teacher's logits. With
`more` it goes on for as many steps (`more-R.pt`, `more_losses`); `used` steps are taken before it restores.
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
            # At ZeRO-3 small parameters are whole after a step, so restoring must gather them anew.
            job.train(0, segment.get("used", 0))
            job.restore(stored, progress)
            first, seen["read"] = progress["optimizer_step"], stored.elements_read
            _keep(job, own, "start")
        seen["losses"] = job.train(first, segment["steps"])
        if recipe.engine.zero_stage > 0 and segment["steps"]:
            seen["not_as_deepspeed"] = _not_as_deepspeed(job)
        _keep(job, own, "end")
        if runtime.rank == 0:
            (own / "progress.json").write_text(json.dumps(job.engine.progress()))
        if segment.get("more"):
            seen["more_losses"] = job.train(first + segment["steps"], segment["more"])
            _keep(job, own, "more")
        seen["logits"] = job.logits().tolist()
        (own / f"seen-{runtime.rank}.json").write_text(json.dumps(seen))
        runtime.barrier()


def _not_as_deepspeed(job):
    """Pieces of trained parameters that are not what DeepSpeed's public functions give."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = job.engine._engine.optimizer
    if job.engine.recipe.engine.zero_stage < 3:
        # DeepSpeed 0.19.8 does this when the first of several parameter groups has stepped, too early for the others.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    trained, whole = [(n, p) for n, p in job.module.named_parameters() if p.requires_grad], {}
    for name, parameter in trained:
        whole[f"student/{name}"] = safe_get_full_fp32_param(parameter).clone().flatten()
        for moment in ("exp_avg", "exp_avg_sq"):
            whole[f"{moment}/{name}"] = safe_get_full_optimizer_state(parameter, moment).clone().flatten()
    mine = [piece for piece in job.engine.pieces() if piece.name in whole]
    assert len(mine) > len(trained)
    return [p.name for p in mine if not p.values.equal(whole[p.name][p.start : p.start + len(p.values)])]


def _keep(job, folder, when):
    pieces = [(piece.name, piece.shape, piece.start, piece.values) for piece in job.pieces()]
    torch.save(pieces, folder / f"{when}-{job.runtime.rank}.pt")


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    assert os.environ["WORLD_SIZE"] == "2"
