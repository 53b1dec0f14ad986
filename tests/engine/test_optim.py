"""Parameter groups and the learning rate of a step, against formulas written out."""

import math

import pytest
from timm.optim import param_groups_layer_decay

from maskmatch_scale.engine.optim import parameter_groups
from maskmatch_scale.engine.schedule import base_lr, lr_factor
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.recipe import OptimRecipe
from tests.conftest import TINY_SEGFORMER, TINY_VIT


def build(backbone, options, **more):
    return build_segmenter(backbone, 3, backbone_options=options, image_size=64, **more)


def by_name(student, recipe):
    """Name → (lr_scale, weight_decay)."""
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(student, recipe)
        for parameter in group["params"]
    }


@pytest.mark.parametrize(
    ("backbone", "options"),
    [("timm/vit_tiny_patch16_224", TINY_VIT), ("transformers/segformer-b0", TINY_SEGFORMER)],
)
def test_every_parameter_is_in_one_group_and_only_weights_decay(backbone, options):
    student = build(backbone, options)
    groups = by_name(student, OptimRecipe(weight_decay=0.1, head_lr_multiplier=10.0))
    assert groups.keys() == dict(student.named_parameters()).keys()
    for name, parameter in student.named_parameters():
        scale, decay = groups[name]
        assert scale == (1.0 if name.startswith("backbone.") else 10.0)
        plain = parameter.dim() == 1 or name.endswith(("pos_embed", "cls_token", "mask_token"))
        assert decay == (0.0 if plain else 0.1), name
    assert any(name.endswith("bias") for name in groups)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "vit_small_patch14_dinov2"]
)
def test_layer_decay_is_timms(name):
    student = build_segmenter(f"timm/{name}", 3, backbone_options={"depth": 3})
    found = by_name(student, OptimRecipe(layer_decay=0.5))
    names = {id(parameter): f"backbone.{name}" for name, parameter in student.backbone.named_parameters()}
    for group in param_groups_layer_decay(student.backbone, layer_decay=0.5):
        for parameter in group["params"]:
            assert found[names[id(parameter)]][0] == pytest.approx(group["lr_scale"]), names[id(parameter)]
    assert found["backbone.blocks.2.attn.proj.weight"][0] > found["backbone.blocks.0.attn.proj.weight"][0]
    assert {scale for key, (scale, _) in found.items() if key.startswith("head.")} == {1.0}


def test_linear_scaling_with_the_global_batch(make_recipe):
    engine = {"micro_batch": 4, "accumulation": 2}
    plain = make_recipe(engine=engine, optim={"lr": 1e-3})
    assert base_lr(plain, 8) == 1e-3
    scaled = make_recipe(engine=engine, optim={"lr": 1e-3, "lr_reference_batch": 16})
    assert base_lr(scaled, 8) == pytest.approx(4e-3)
    assert base_lr(scaled, 1) == pytest.approx(5e-4)


def test_schedules_by_step():
    poly = OptimRecipe(warmup_steps=4, poly_power=0.9)
    assert [lr_factor(step, 10, poly) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(7, 10, poly) == pytest.approx(0.5**0.9)
    cosine = OptimRecipe(schedule="cosine")
    assert lr_factor(3, 10, cosine) == pytest.approx(0.5 * (1 + math.cos(0.3 * math.pi)))
    assert lr_factor(0, 10, cosine) == 1.0
    assert lr_factor(9, 10, OptimRecipe(schedule="constant")) == 1.0
