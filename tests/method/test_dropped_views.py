"""Views of a base of which only some units are computed (`method.strong_view.keep`), against the plain formula."""

import copy

import pytest
import torch
from torch.nn import functional as F

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.errors import UserError
from maskmatch_scale.method.draws import Drawn
from maskmatch_scale.method.maskmatch import MaskMatch, view_draws
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.units import sample_visible, stack_units, unstack_units
from maskmatch_scale.recipe import MethodRecipe
from maskmatch_scale.seeds import generator
from maskmatch_scale.train import train
from tests.conftest import TINY_SEGFORMER, TINY_VIT

MODELS = {
    "segformer": {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER, "head": "pixel_shuffle"},
    "vit": {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT},
}


def one_step(recipe, model, *, batchnorm_frozen=True):
    """Module, step and pseudo-labels, in float64."""
    torch.manual_seed(0)
    segmenter = build_segmenter(num_classes=3, image_size=64, **MODELS[model]).double()
    module = MaskMatch(segmenter, recipe.method, recipe.run.seed, 255, batchnorm_frozen=batchnorm_frozen)
    module = module.double().train()
    draw = view_draws(segmenter, recipe.method, recipe.run.seed, recipe.data.crop_px)
    (batch,) = load_batches(TrainingBatches(recipe, 3, 0, 1, unlabelled=True, draw=draw), 0, 1)
    step = module.prepare(batch)
    return module, step, module.pseudo_label(step, copy.deepcopy(segmenter).eval())


def unlabelled_loss(module, step, pseudo):
    """L_u and its gradient by parameter (0 where it has none)."""
    module.zero_grad()
    loss, _ = module("loss_u", step, pseudo, 1 / module.denominators(step))
    loss.backward()
    return loss.detach(), gradients(module.segmenter)


def gradients(segmenter):
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in segmenter.named_parameters()
    }


@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize("mask", [None, 0.5])
@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_taken_on_all_pixels_of_what_some_units_show(make_recipe, model, mask, keep):
    """At 1 it is that of the whole view."""
    recipe = make_recipe(
        method={"mask": {"keep": mask}, "strong_view": {"keep": keep}}, data={"scale_range": [0.5, 0.9]}
    )
    module, step, pseudo = one_step(recipe, model)
    loss, found = unlabelled_loss(module, step, pseudo)

    (view,) = step.views
    positions, grid = step.unlabelled.positions, module.segmenter.unit_grid(64, 64)
    visible = torch.cat([sample_visible(1, grid, round(4 * keep), generator(0, "strong mask", p)) for p in positions])
    images = ((view.images - module.mean) / module.std).double()
    module.zero_grad()
    logits = module.segmenter(images) if keep == 1 else module.segmenter(images, visible)
    up = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
    ce = F.cross_entropy(up, view.cutmix(pseudo.labels), reduction="none") * view.cutmix(pseudo.confident)
    valid = view.cutmix(step.unlabelled.weak.valid)
    expected = ce[valid].mean()
    expected.backward()
    assert expected > 0
    assert not valid.all()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found, gradients(module.segmenter), rtol=1e-7, atol=1e-10)
    guessed = [value.abs().max() for name, value in found.items() if name.startswith("context.")]
    assert bool(max(guessed) > 0) == (keep < 1)


def test_units_depend_on_seed_view_and_position_alone():
    segmenter = build_segmenter(num_classes=3, image_size=64, **MODELS["vit"])
    plain = MethodRecipe.model_validate({"mask": {"keep": 0.5}})
    method = MethodRecipe.model_validate({"mask": {"keep": 0.5}, "strong_view": {"keep": 0.25}})
    draw = view_draws(segmenter, method, 3, (128, 160))
    rows = draw(range(7))
    # Whatever the batch, so also the rank, is.
    assert torch.cat([draw([position]) for position in range(7)]).equal(rows)
    # Nothing else is drawn otherwise, and the mask has units of its own.
    before = view_draws(segmenter, plain, 3, (128, 160))(range(7))
    assert rows[:, : before.shape[1]].equal(before)
    drawn = Drawn(rows, draw.strong_views, draw.base_views, draw.base_visible)
    assert drawn.visible.equal(Drawn(before, 1).visible)
    assert drawn.visible.shape == (7, 10)
    assert drawn.visible_of_base.shape == (7, 5)
    assert len({tuple(row) for row in drawn.visible_of_base.tolist()}) == 7
    assert not view_draws(segmenter, method, 4, (128, 160))(range(7))[:, -5:].equal(drawn.visible_of_base.double())


@pytest.mark.parametrize(
    ("mask", "keep", "last"),
    [
        ({"keep": 0.5}, None, "loss_m"),
        ({"keep": 0.5}, 0.5, "loss_m"),
        ({"keep": None}, 0.5, "loss_u"),
        ({"keep": 0.5, "mode": "zero"}, 0.5, "loss_u"),
        ({"keep": 1.0}, 0.5, "loss_u"),
        ({"keep": 0.5}, 1.0, "loss_m"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_the_last_part_reaches_every_parameter(make_recipe, model, mask, keep, last):
    module, step, pseudo = one_step(make_recipe(method={"mask": mask, "strong_view": {"keep": keep}}), model)
    assert step.parts[-1] == last
    module(last, step, pseudo, 1 / module.denominators(step))[0].backward()
    assert all(parameter.grad is not None for parameter in module.segmenter.parameters())


@pytest.mark.parametrize("keep", [None, 0.5, 1.0])
def test_running_statistics_are_those_of_whole_views(make_recipe, keep):
    recipe = make_recipe(method={"mask": {"keep": None}, "strong_view": {"keep": keep}})
    module, step, pseudo = one_step(recipe, "segformer", batchnorm_frozen=False)
    before = {name: value.clone() for name, value in module.segmenter.named_buffers()}
    unlabelled_loss(module, step, pseudo)
    same = all(value.equal(before[name]) for name, value in module.segmenter.named_buffers())
    assert same == (keep is not None)


def test_units_stack_to_maps_and_back():
    tokens = torch.rand(2, 3, 4, 4, 5)
    maps = stack_units(tokens)
    assert maps.shape == (2, 5, 12, 4)
    assert maps[1, 2, 4:8].equal(tokens[1, 1, :, :, 2])
    assert unstack_units(maps).equal(tokens)


def test_a_run_without_a_masked_view_has_a_context_decoder(make_recipe):
    recipe = make_recipe(
        method={"mask": {"keep": None}, "strong_view": {"keep": 0.5}},
        engine={"precision": "fp32"},
        run={"steps": 1, "evaluate_every": 0},
    )
    run = train(recipe)
    assert "context." in (run / "checkpoints" / "step-00000001" / "index.json").read_text()


@pytest.mark.parametrize(
    ("crop_px", "keep", "message"),
    [([64, 40], 0.5, r"^data\.crop_px=\[64, 40\]: .* not whole units"), (32, 0.3, r"keep: 0\.3 of 1×1 units leaves")],
)
def test_a_crop_that_has_no_such_units_is_refused(make_recipe, crop_px, keep, message):
    method = {"mask": {"keep": None}, "strong_view": {"keep": keep}}
    sections = {"data": {"crop_px": crop_px}, "engine": {"precision": "fp32"}, "run": {"steps": 1}}
    recipe = make_recipe(method=method, **sections)
    with pytest.raises(UserError, match=message):
        train(recipe)
    # A base without views drops nothing.
    train(make_recipe(method=method | {"base": "supervised"}, **sections))
