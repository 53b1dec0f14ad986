"""Evaluating a run that goes on meanwhile."""

import shutil

from maskmatch_scale.checkpoints.keeping import Keep, Keeper
from maskmatch_scale.runs.evaluate import evaluate_run
from maskmatch_scale.train import train


def test_both_models_are_those_of_one_checkpoint(make_recipe):
    """The run writes a newer one, and would delete the old one, while the teacher is evaluated."""
    run = train(make_recipe(run={"steps": 1, "evaluate_every": 0}))
    folder = run / "checkpoints"
    keeper = Keeper(folder, Keep(1, 0, 0), 1)

    def goes_on():
        if not (folder / "step-00000002").exists():
            shutil.copytree(folder / "step-00000001", folder / "step-00000002")
            (folder / "step-00000002" / "state.json").write_text('{"step": 2}')
            (folder / "latest").write_text("step-00000002")
            keeper.tidy(2)

    found = evaluate_run(run, "val", ("ema", "student"), goes_on)
    assert [(record["weights"], record["step"]) for record in found] == [("ema", 1), ("student", 1)]
    keeper.tidy(2)
    assert not (folder / "step-00000001").exists()
