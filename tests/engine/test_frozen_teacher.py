"""A step with a frozen teacher against the formulas of docs/method.md, with labels made by hand, in float64."""

import pytest
import torch
from torch.nn import functional as F

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.engine.frozen_teacher import FrozenTeacher
from maskmatch_scale.method.maskmatch import MaskMatch, view_draws
from maskmatch_scale.models import build_segmenter
from tests.conftest import TINY_SEGFORMER, TINY_VIT
from tests.method.parts import all_parts

SEGFORMER = {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER}
VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT, "head": "linear"}
PATCH_14 = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT | {"patch_size": 14}, "unit_px": 14}
CPU = torch.device("cpu")


def build(model, seed):
    torch.manual_seed(seed)
    segmenter = build_segmenter(num_classes=3, image_size=64, **model)
    for name, value in segmenter.state_dict().items():
        if name.endswith("running_mean"):  # statistics that no batch has
            value.normal_()
        elif value.is_floating_point() and "running" not in name:
            value += torch.randn(value.shape) * 0.2
    (bias,) = (value for value in segmenter.head.parameters() if value.shape == (3,))
    with torch.no_grad():  # so that each class is predicted somewhere
        bias -= segmenter.eval()(torch.rand(4, 3, 224, 224)).mean((0, 2, 3))
    return segmenter.train()


def up(logits, mode="bilinear"):
    return F.interpolate(logits, size=(64, 64), mode=mode, align_corners=False)


def taught(module, step, teacher):
    return module.pseudo_label(step, teacher, teacher.normalise)


@pytest.fixture(params=[(SEGFORMER, VIT), (VIT, SEGFORMER)], ids=["segformer-teaches-vit", "vit-teaches-segformer"])
def pair(request):
    teacher, student = request.param
    return build(teacher, 1).double(), build(student, 0).double()


@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.0, 1.5]], ids=["one", "ensemble"])
def test_losses_equal_the_formulas(make_recipe, pair, scales):
    segmenter, student = pair
    recipe = make_recipe(
        method={"scales": scales, "threshold": 0.4, "mask": {"keep": 0.5}}, engine={"precision": "fp32"}
    )
    module = MaskMatch(student, recipe.method, 0, 255, batchnorm_frozen=True).double().train()
    draw = view_draws(student, recipe.method, 0, recipe.data.crop_px)
    (batch,) = load_batches(TrainingBatches(recipe, 3, 0, 1, unlabelled=True, draw=draw), 0, 1)
    step = module.prepare(batch)
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    teacher = FrozenTeacher(segmenter.train(), recipe, CPU)
    pseudo = taught(module, step, teacher)
    _, sums = all_parts(module, step, pseudo, 1 / module.denominators(step))

    def normal(images, of):
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (of.mean, of.std))
        return ((images - mean) / std).double()

    assert segmenter.mean != student.mean
    weak, strong = step.unlabelled.weak, step.views[0]
    p = 0
    for scale in scales:
        side = round(64 * scale)
        images = F.interpolate(normal(weak.images, segmenter), size=(side, side), mode="bilinear", align_corners=False)
        with torch.no_grad():
            p = p + up(segmenter.eval()(images)).softmax(1) / len(scales)
    confidence, labels = p.max(1)
    mix, confident = strong.cutmix, confidence >= 0.4
    assert pseudo.labels.equal(labels)
    assert pseudo.confident.equal(confident)
    assert 0 < confident.double().mean() < 1
    assert len(labels.unique()) > 1
    ce = F.cross_entropy(up(student(normal(strong.images, student))), mix(labels), reduction="none")
    loss_u = (ce * mix(confident))[mix(weak.valid)].mean()
    ce = F.cross_entropy(up(student(normal(weak.images, student), step.masked.visible)), labels, reduction="none")
    loss_m = (ce * confident)[weak.valid].mean()
    found = (sums / module.denominators(step))[1:]
    torch.testing.assert_close(found, torch.stack([loss_u, loss_m]).detach(), rtol=1e-9, atol=1e-9)
    after = segmenter.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in segmenter.parameters())
    assert not teacher(torch.rand(1, 3, 64, 64).double()).requires_grad


def test_sides_are_whole_patches_of_its_own(make_recipe):
    recipe = make_recipe(model=VIT, method={"scales": [0.5, 1.0]}, engine={"precision": "fp32"})
    student, seen = build(VIT, 0), []
    module = MaskMatch(student, recipe.method, 0, 255).train()
    draw = view_draws(student, recipe.method, 0, recipe.data.crop_px)
    (batch,) = load_batches(TrainingBatches(recipe, 3, 0, 1, unlabelled=True, draw=draw), 0, 1)
    teacher = FrozenTeacher(build(PATCH_14, 1), recipe, CPU)
    teacher.module.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[2:])))
    assert taught(module, module.prepare(batch), teacher).labels.shape == (2, 64, 64)
    assert seen == [(28, 28), (70, 70)]


@pytest.mark.parametrize(("precision", "product"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_stay_fp32_and_products_have_the_precision_of_the_run(make_recipe, precision, product):
    found = []
    teacher = FrozenTeacher(build(VIT, 1), make_recipe(engine={"precision": precision}), CPU)
    teacher.module.backbone.blocks[0].mlp.fc1.register_forward_hook(lambda _, given, made: found.append(made.dtype))
    teacher(teacher.normalise(torch.rand(1, 3, 64, 64)))
    assert found == [product]
    assert {parameter.dtype for parameter in teacher.module.parameters()} == {torch.float32}
