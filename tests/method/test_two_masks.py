"""Two masked views of each image (`method.mask.complement`), against the plain formula in float64."""

import copy

import pytest
import torch
from torch.nn import functional as F

from maskmatch_scale.errors import UserError
from maskmatch_scale.method.draws import Drawn
from maskmatch_scale.method.maskmatch import view_draws
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.units import masked_units, visible_pixel_mask
from maskmatch_scale.recipe import MaskRecipe, MethodRecipe
from maskmatch_scale.recipe.sections import RecipeError
from maskmatch_scale.train import train
from tests.method.parts import MODELS, first_batch, one_step


@pytest.mark.parametrize("mask", [{}, {"pixels": "masked", "view": "strong"}, {"pixels": "visible", "mode": "zero"}])
@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_the_mean_over_both(make_recipe, model, mask):
    sections = {"data": {"scale_range": [0.5, 0.9]}}
    recipe = make_recipe(method={"mask": {"keep": 0.5, "complement": True} | mask}, **sections)
    module = one_step(recipe, model)
    step = module.prepare(first_batch(recipe, module))
    pseudo = module.pseudo_label(step, copy.deepcopy(module.segmenter).eval())
    calls = []
    module.segmenter.head.register_forward_pre_hook(lambda head, inputs: calls.append(len(inputs[0][0])))
    loss, _ = module("loss_m", step, pseudo, 1 / module.denominators(step))
    loss.backward()
    assert calls == [2 + 2]  # both of both images in one forward pass
    found = {name: parameter.grad for name, parameter in module.segmenter.named_parameters()}

    one = make_recipe(method={"mask": {"keep": 0.5} | mask}, **sections)
    first = one_step(one, model).prepare(first_batch(one, one_step(one, model))).masked.visible
    grid, unit = module.segmenter.unit_grid(64, 64), module.segmenter.unit_px
    view = step.masked.view
    target = pseudo.mixed(view.cutmix)
    total, pixels = 0.0, 0
    module.zero_grad()
    for visible in (first, masked_units(first, grid)):
        logits = module.segmenter(module.normalise(view.images), visible, mask.get("mode", "drop"))
        up = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
        seen = visible_pixel_mask(visible, grid, unit)
        counted = view.valid & {"masked": ~seen, "visible": seen}.get(mask.get("pixels"), torch.ones_like(seen))
        ce = F.cross_entropy(up, target.labels, reduction="none") * target.confident
        total, pixels = total + ce[counted].sum(), pixels + counted.sum()
    expected = total / pixels
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for name, parameter in module.segmenter.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-10)


def test_second_units_are_as_many_of_the_others_and_the_first_ones_stay():
    segmenter = build_segmenter(num_classes=3, image_size=64, **MODELS["vit"])
    one = view_draws(segmenter, MethodRecipe(mask=MaskRecipe(keep=0.3)), 3, (128, 160))
    two = view_draws(segmenter, MethodRecipe(mask=MaskRecipe(keep=0.3, complement=True)), 3, (128, 160))
    rows = two(range(60))
    assert torch.cat([two([position]) for position in range(60)]).equal(rows)
    first, second = Drawn(rows, 1, complement=True).visible.chunk(2)
    assert first.equal(Drawn(one(range(60)), 1).visible)
    assert second.shape == (60, 6)
    assert all(set(a).isdisjoint(b) and b == sorted(set(b)) for a, b in zip(first.tolist(), second.tolist()))
    assert set(second.flatten().tolist()) == set(range(20))
    assert not view_draws(segmenter, MethodRecipe(mask=MaskRecipe(keep=0.3, complement=True)), 4, (128, 160))(
        range(60)
    )[:, -6:].equal(second.double())


def test_more_than_half_twice_is_refused(make_recipe):
    with pytest.raises(RecipeError, match=r"method\.mask\.complement=true with method\.mask\.keep=0\.6: "):
        make_recipe(method={"mask": {"keep": 0.6, "complement": True}})
    recipe = make_recipe(
        method={"mask": {"keep": 0.5, "complement": True}},
        data={"crop_px": [32, 96]},
        engine={"precision": "fp32"},
        run={"steps": 1},
    )
    with pytest.raises(UserError, match=r"2 visible units of 1×3 are more than half"):
        train(recipe)
