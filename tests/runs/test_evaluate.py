"""Evaluating a run that goes on meanwhile, and how its recipe says that held-out images are predicted."""

import shutil

import pytest
import torch

from maskmatch_scale.checkpoints.keeping import Keep, Keeper
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.errors import UserError
from maskmatch_scale.runs.evaluate import evaluate_run, inference_of
from maskmatch_scale.runs.model import build_student
from maskmatch_scale.train import train
from maskmatch_scale.training.preflight import check_model
from tests.conftest import TINY_VIT

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT}


def test_windows_are_the_training_crop_or_have_a_size_of_their_own(make_recipe):
    for keys, size in (({}, (64, 64)), ({"window_px": 96}, (96, 96)), ({"window_px": [80, 112]}, (80, 112))):
        recipe = make_recipe(model=VIT, evaluation=keys)
        student = build_student(recipe, ShardIndex.load(recipe.data.root))
        how = inference_of(recipe, student, torch.device("cpu"))
        assert (how.window_px, how.patch_px) == (size, 16)
        check_model(recipe, student)


def test_a_window_that_the_model_does_not_take_is_refused_before_the_run(make_recipe):
    recipe = make_recipe(model=VIT, evaluation={"window_px": [80, 100]})
    student = build_student(recipe, ShardIndex.load(recipe.data.root))
    with pytest.raises(UserError, match=r"evaluation\.window_px=\[80, 100\]: .* 80×96"):
        check_model(recipe, student)
    smaller = make_recipe(model=VIT, evaluation={"scales": [0.25, 1.0]})
    with pytest.raises(UserError, match=r"evaluation\.scales=\[0\.25, 1\.0\] with windows of 64×64 px"):
        check_model(smaller, student)


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
