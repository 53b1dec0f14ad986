"""Mean Teacher's loss against the formula, written out with whole probabilities in float64."""

import pytest
import torch
from torch.nn import functional as F

from maskmatch_scale.method.maskmatch import MaskMatch
from tests.method.parts import MODELS, all_parts, colour_teacher, first_batch, one_step

METHOD = {
    "base": "mean_teacher", "scales": [0.5, 1.0], "threshold": 1.0, "unlabelled_weight": 0.4,
    "strong_view": {"cutmix_probability": 1.0},
}  # fmt: skip


def up(maps):
    return F.interpolate(maps, size=(64, 64), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("keep", [None, 0.5])
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradient_equal_the_formula(make_recipe, model, keep):
    recipe = make_recipe(method=METHOD | {"mask": {"keep": keep}}, data={"scale_range": [0.5, 0.9]})
    module = one_step(recipe, model)
    step = module.prepare(first_batch(recipe, module))
    pseudo = module.pseudo_label(step, colour_teacher)
    loss, _ = module("loss_u", step, pseudo, 1 / module.denominators(step))
    loss.backward()
    weights = [parameter for parameter in module.segmenter.parameters() if parameter.grad is not None]
    found = [parameter.grad.clone() for parameter in weights]

    weak, strong = step.unlabelled.weak, step.views[0]
    images = module.normalise(weak.images)
    small = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    with torch.no_grad():
        p = (up(colour_teacher(small)).softmax(1) + up(colour_teacher(images)).softmax(1)) / 2
    box = strong.cutmix.inside[:, None]
    p = torch.where(box, p.flip(0), p)  # of two images each is the other's partner
    omega = torch.where(box, weak.valid[:, None].flip(0), weak.valid[:, None])
    assert not omega.all()
    student = up(module.segmenter(module.normalise(strong.images))).softmax(1)
    expected = 0.4 * ((student - p) ** 2 * omega).sum() / omega.sum()
    assert not pseudo.confident.any()  # no threshold
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for own, reference in zip(found, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-6, atol=1e-12)


def test_probabilities_are_kept_for_this_base_alone(make_recipe):
    for base in ("mean_teacher", "fixmatch"):
        recipe = make_recipe(method={"base": base})
        module = one_step(recipe, "vit")
        step = module.prepare(first_batch(recipe, module))
        pseudo = module.pseudo_label(step, module.segmenter)
        assert (pseudo.probabilities is not None) == (base == "mean_teacher")


def test_a_student_that_is_the_teacher_has_no_loss_without_changes(make_recipe):
    nothing = dict.fromkeys(
        ("brightness", "contrast", "saturation", "hue", "grey_probability", "blur_probability", "cutmix_probability"),
        0.0,
    )
    recipe = make_recipe(method={"base": "mean_teacher", "strong_view": nothing, "mask": {"keep": None}})
    module: MaskMatch = one_step(recipe, "vit").eval()
    step = module.prepare(first_batch(recipe, module))
    _, sums = all_parts(module, step, module.pseudo_label(step, module.segmenter), torch.ones(3, dtype=torch.float64))
    assert sums[1] < 1e-12
    assert sums[0] > 1
