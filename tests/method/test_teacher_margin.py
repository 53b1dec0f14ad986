"""The teacher sees a margin around the student's crop (`method.teacher_margin_px`), against formulas in float64."""

import pytest
import torch
from torch.nn import functional as F

from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.engine.frozen_teacher import FrozenTeacher
from maskmatch_scale.method.maskmatch import view_draws
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.units import visible_pixel_mask
from maskmatch_scale.recipe import RecipeError
from tests.data.batches.common import same
from tests.method.parts import MODELS, all_parts, first_batch, one_step

MARGIN = 24
"""Not whole patches of 16 px: the crop begins within one of the teacher's."""
METHOD = {"teacher_margin_px": MARGIN, "scales": [0.5, 1.0], "threshold": 0.37, "mask": {"keep": 0.5}}
SMALL = {"scale_range": [0.5, 0.9]}
"""So that crops have padding."""


def up(maps, side=64):
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)


def middle(maps):
    return maps[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def labels_by_hand(teacher, images, patch_px):
    """Probabilities (U, classes, 64, 64) of normalised images (U, 3, 112, 112): of all of it, then the middle."""
    sides = [max(patch_px, round(112 * scale / patch_px) * patch_px) for scale in METHOD["scales"]]
    with torch.no_grad():
        maps = [up(teacher(up(images, side) if side != 112 else images), 112).softmax(1) for side in sides]
    return middle(torch.stack(maps).mean(0))


def noisy(segmenter):
    """With weights large enough that labels vary within an image."""
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return segmenter


@pytest.mark.parametrize("frozen", [False, True], ids=["average", "frozen"])
@pytest.mark.parametrize("base", ["fixmatch", "mean_teacher"])
@pytest.mark.parametrize("model", MODELS)
def test_losses_equal_the_formulas(make_recipe, model, base, frozen):
    strong = {"cutmix_probability": 1.0}
    recipe = make_recipe(
        method=METHOD | {"base": base, "strong_view": strong}, data=SMALL, engine={"precision": "fp32"}
    )
    module = one_step(recipe, model)
    batch = first_batch(recipe, module)
    assert batch.unlabelled_images.shape == (2, 3, 112, 112)
    step = module.prepare(batch)
    torch.manual_seed(1)
    other = {"segformer": "vit", "vit": "segformer"}[model]
    built = build_segmenter(num_classes=3, image_size=64, **MODELS[other if frozen else model])
    own = noisy(built.double()).eval()
    with torch.no_grad():
        bias = next(parameter for parameter in own.head.parameters() if parameter.shape == (3,))
        bias -= own(module.normalise(batch.unlabelled_images / 255)).mean((0, 2, 3))
    teacher = FrozenTeacher(own, recipe, torch.device("cpu")) if frozen else own
    pseudo = module.pseudo_label(step, teacher, teacher.normalise if frozen else None)
    loss, sums = all_parts(module, step, pseudo, 1 / module.denominators(step))

    normal = module.normalise
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (own.mean, own.std))
    p = labels_by_hand(own, ((batch.unlabelled_images / 255 - mean) / std).double(), own.patch_px)
    confidence, labels = p.max(1)
    confident = confidence >= METHOD["threshold"]
    assert pseudo.labels.equal(labels)
    assert pseudo.confident.equal(confident)
    assert 0 < confident.double().mean() < 1
    assert len(labels.unique()) > 1
    without = own(((middle(batch.unlabelled_images) / 255 - mean) / std).double())
    assert not up(without).argmax(1).equal(labels)

    # The student sees the middle alone, and so does every loss.
    s, crop, valid = module.segmenter, middle(batch.unlabelled_images) / 255, batch.unlabelled_valid
    assert not valid.all()
    assert step.unlabelled.weak.images.equal(crop)
    view = step.views[0]
    mix = view.cutmix
    logits = up(s(normal(view.images)))
    if base == "fixmatch":
        ce = F.cross_entropy(logits, mix(labels), reduction="none")
        loss_u = (ce * mix(confident))[mix(valid)].mean()
    else:
        omega = mix(valid)
        error = (logits.softmax(1) - torch.where(mix.inside[:, None], p.flip(0), p)).square().sum(1)
        loss_u = error[omega].sum() / omega.sum()
    seen = visible_pixel_mask(step.masked.visible, s.unit_grid(64, 64), s.unit_px)
    assert seen.any()
    ce = F.cross_entropy(up(s(normal(crop), step.masked.visible)), labels, reduction="none")
    loss_m = (ce * confident)[valid].mean()
    found = sums / module.denominators(step)
    torch.testing.assert_close(found[1:], torch.stack([loss_u, loss_m]).detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, found[0] + loss_u + loss_m, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_student_sees_what_it_sees_without(make_recipe, workers):
    """Same crops, strong views, boxes and masks, whichever process makes them; labelled images too."""

    def steps(margin_px):
        recipe = make_recipe(
            method=METHOD | {"teacher_margin_px": margin_px, "burn_in": 0.25},
            data=SMALL | {"workers": workers},
            run={"steps": 4},
        )
        module = one_step(recipe, "vit")
        draw = view_draws(module.segmenter, recipe.method, recipe.run.seed, recipe.data.crop_px)
        made = TrainingBatches(recipe, 3, 0, 1, unlabelled=True, draw=draw)
        return [(batch, module.prepare(batch)) for batch in load_batches(made, 0, 4)]

    wide, plain = steps(MARGIN), steps(0)
    assert plain[0][1].unlabelled is wide[0][1].unlabelled is None  # the burn-in
    for (around, one), (batch, two) in zip(wide[1:], plain[1:], strict=True):
        assert two.with_margin is None
        crop = middle(around.unlabelled_images)
        tensors = (around.labelled_images, around.labels, crop, around.unlabelled_valid, around.draws)
        assert same(around.with_tensors(tensors), batch)
        assert around.draws.equal(batch.draws)
        for seen, expected in (
            (one.unlabelled.weak, two.unlabelled.weak), (one.views[0], two.views[0]), (one.masked.view, two.masked.view)
        ):  # fmt: skip
            assert seen.images.equal(expected.images)
            assert seen.valid.equal(expected.valid)
        assert one.masked.visible.equal(two.masked.visible)
        assert one.masked.counted.equal(two.masked.counted)


def test_memory_for_batches_has_room_for_the_margin(make_recipe):
    recipe = make_recipe(method=METHOD, data={"crop_px": [64, 80]})
    made = TrainingBatches(recipe, 3, 0, 1, unlabelled=True)
    largest, first = made.largest_batch(), made[0]
    assert [tensor.shape for tensor in largest.tensors[:4]] == [tensor.shape for tensor in first.tensors[:4]]
    assert first.unlabelled_images.shape == (2, 3, 64 + 2 * MARGIN, 80 + 2 * MARGIN)
    assert (first.labelled_images.shape, first.unlabelled_valid.shape) == ((2, 3, 64, 80), (2, 64, 80))
    assert Batch.empty(1, 1, (4, 5), margin_px=3).unlabelled_images.shape == (1, 3, 10, 11)


def test_what_is_refused(make_recipe):
    with pytest.raises(RecipeError, match=r"method\.teacher_margin_px"):
        make_recipe(method={"teacher_margin_px": -1})
    with pytest.raises(RecipeError, match=r"method\.teacher_margin_px=24 with method\.views_of=labelled: "):
        make_recipe(method=METHOD | {"views_of": "labelled"})
