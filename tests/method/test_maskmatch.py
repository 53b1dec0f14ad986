"""One step's losses against the formulas of docs/method.md, written out plainly in float64."""

import pytest
import torch
from torch.nn import functional as F

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.method.ema import ema_decay
from maskmatch_scale.method.maskmatch import MaskMatch, view_draws
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.units import visible_pixel_mask
from tests.conftest import TINY_SEGFORMER, TINY_VIT
from tests.method.parts import all_parts

BACKBONES = {
    "segformer": {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER, "head": "pixel_shuffle"},
    "vit": {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT},
}


def build(family, recipe, **options):
    torch.manual_seed(0)
    segmenter = build_segmenter(num_classes=3, image_size=64, **BACKBONES[family]).double()
    # BatchNorm frozen: then nothing but the formulas decides.
    module = (
        MaskMatch(segmenter, recipe.method, recipe.run.seed, 255, batchnorm_frozen=True, **options).double().train()
    )
    draw = view_draws(segmenter, recipe.method, recipe.run.seed, recipe.data.crop_px)
    (batch,) = load_batches(TrainingBatches(recipe, 3, 0, 1, unlabelled=True, draw=draw), 0, 1)
    return module, batch


def up(logits):
    return F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("view", ["weak", "strong"])
@pytest.mark.parametrize("pixels", ["all", "masked", "visible"])
def test_losses_equal_the_formulas(make_recipe, family, view, pixels):
    recipe = make_recipe(
        method={"mask": {"keep": 0.5, "view": view, "pixels": pixels, "weight": 0.7}, "unlabelled_weight": 0.4},
        data={"scale_range": [0.5, 0.9]},
    )
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    module, batch = build(family, recipe, class_weight=weight)
    step = module.prepare(batch)
    pseudo = module.pseudo_label(step, module.segmenter)
    loss, sums = all_parts(module, step, pseudo, 1 / module.denominators(step))

    s, normal = module.segmenter, lambda images: ((images - module.mean) / module.std).double()
    labels = batch.labels.long().masked_fill(batch.labels == 255, -100)
    loss_x = F.cross_entropy(up(s(normal(batch.labelled_images / 255))), labels, weight)
    strong, weak = step.views[0], step.unlabelled.weak
    mix = strong.cutmix
    mixed_labels, mixed_confident = mix(pseudo.labels), mix(pseudo.confident)
    ce = F.cross_entropy(up(s(normal(strong.images))), mixed_labels, reduction="none")
    loss_u = (ce * mixed_confident)[mix(weak.valid)].mean()
    images, target, confident, omega = (
        (weak.images, pseudo.labels, pseudo.confident, weak.valid)
        if view == "weak"
        else (strong.images, mixed_labels, mixed_confident, mix(weak.valid))
    )
    visible = step.masked.visible
    seen = visible_pixel_mask(visible, s.unit_grid(64, 64), s.unit_px)
    region = omega & {"all": torch.ones_like(seen), "masked": ~seen, "visible": seen}[pixels]
    ce = F.cross_entropy(up(s(normal(images), visible)), target, reduction="none")
    loss_m = (ce * confident)[region].mean()

    expected = torch.stack([loss_x, loss_u, loss_m])
    assert pseudo.confident.any()
    torch.testing.assert_close(sums / module.denominators(step), expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, loss_x + 0.4 * loss_u + 0.7 * loss_m, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", BACKBONES)
def test_masked_loss_has_no_gradient_to_masked_pixels(make_recipe, family):
    recipe = make_recipe(method={"base": "supervised", "mask": {"keep": 0.5}})
    module, batch = build(family, recipe)
    step = module.prepare(batch)
    pseudo = module.pseudo_label(step, module.segmenter)
    images = step.masked.view.images.double().requires_grad_()
    object.__setattr__(step.masked.view, "images", images)
    module._masked_loss_sum(step, pseudo).backward()
    seen = visible_pixel_mask(step.masked.visible, module.segmenter.unit_grid(64, 64), module.segmenter.unit_px)
    masked = ~seen[:, None].expand_as(images)
    assert (images.grad[masked] == 0).all()
    assert images.grad[~masked].abs().max() > 0


@pytest.mark.parametrize("family", BACKBONES)
def test_masked_positions_are_predicted_from_their_surroundings(make_recipe, family):
    module, batch = build(family, make_recipe())
    step = module.prepare(batch)
    visible = torch.tensor([[0, 3], [0, 3]])
    image = step.unlabelled.weak.images[:1].double()
    logits = up(module.segmenter(torch.cat([image, 1 - image]), visible))
    hidden = ~visible_pixel_mask(visible, module.segmenter.unit_grid(64, 64), module.segmenter.unit_px)[0]
    assert (logits[0] - logits[1])[:, hidden].abs().mean() > 1e-6
    # And they differ from one masked place to the next: the mask tokens carry position.
    assert logits[0][:, hidden].std(dim=1).max() > 1e-6


def test_switched_off_parts_cost_nothing(make_recipe):
    plain = make_recipe(method={"base": "supervised", "mask": {"keep": None}})
    module, _ = build("vit", plain)
    (batch,) = load_batches(TrainingBatches(plain, 3, 0, 1, unlabelled=False), 0, 1)
    step = module.prepare(batch)
    assert step.unlabelled is step.masked is module.pseudo_label(step, module.segmenter) is None
    assert step.parts == ("loss_x",)


def test_images_with_no_valid_pixel_change_nothing(make_recipe):
    module, batch = build("vit", make_recipe())
    batch.labels.fill_(255)
    batch.unlabelled_valid.fill_(False)
    step = module.prepare(batch)
    pseudo = module.pseudo_label(step, module.segmenter)
    assert module.denominators(step).eq(0).all()
    _, sums = all_parts(module, step, pseudo, 1 / module.denominators(step).clamp(min=1))
    assert sums.eq(0).all()


def test_frozen_batchnorm_stays_frozen(make_recipe):
    torch.manual_seed(0)
    segmenter = build_segmenter("transformers/segformer-b0", 3, backbone_options=TINY_SEGFORMER)
    norm = segmenter.head.batch_norm
    assert (
        not MaskMatch(segmenter, make_recipe().method, 0, 255, batchnorm_frozen=True)
        .train()
        .segmenter.head.batch_norm.training
    )
    assert MaskMatch(segmenter, make_recipe().method, 0, 255).train() is not None
    assert norm.training


def test_ema_decay_is_a_mean_at_first():
    assert [ema_decay(step, 0.9) for step in (1, 2, 3)] == pytest.approx([1 / 2, 2 / 3, 3 / 4])
    assert ema_decay(100, 0.9) == 0.9
