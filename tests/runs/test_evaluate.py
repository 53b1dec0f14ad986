"""How a run's recipe says that held-out images are predicted."""

import pytest
import torch

from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.errors import UserError
from maskmatch_scale.runs.evaluate import inference_of
from maskmatch_scale.runs.model import build_student
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
