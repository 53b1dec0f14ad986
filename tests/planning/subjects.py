"""Recipes of small models that several tests plan."""

from maskmatch_scale.planning.build import build
from maskmatch_scale.planning.hardware import gpu_named
from maskmatch_scale.planning.setting import Gpu
from maskmatch_scale.recipe import parse_recipe
from tests.conftest import TINY_SEGFORMER, TINY_VIT

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT | {"img_size": 64}, "num_classes": 3}
SEGFORMER = {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER, "num_classes": 3}
CPU = Gpu("cpu", 10**10, 1e11, 1e11, 1e10, 0.0, "none")


def recipe_of(model=VIT, **sections):
    content = {
        "data": {"root": "nowhere", "crop_px": 64},
        "model": model,
        "method": {"scales": [1.0]},
        "engine": {"micro_batch": 2, "precision": "fp32"},
        "run": {"dir": "run", "steps": 100},
    }
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section
    return parse_recipe(content)


def built_of(model=VIT, gpu="h100", **sections):
    return build(recipe_of(model, **sections), gpu_named(gpu) if isinstance(gpu, str) else gpu)
