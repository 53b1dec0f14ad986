"""Subjects of plans."""

import pytest
import torch

from maskmatch_scale.models import build_segmenter
from maskmatch_scale.planning.subject import Subject
from tests.conftest import TINY_SEGFORMER, TINY_VIT

FAMILIES = {
    "vit": {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT | {"depth": 4}},
    "segformer": {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER},
}


@pytest.fixture
def make_subject(make_recipe):
    """A subject of a tiny model on a CPU; sections of its recipe as keyword arguments."""

    def make(family="vit", images=2, device="cpu", freeze=None, **sections):
        engine = {"precision": "fp32", "micro_batch": images} | sections.pop("engine", {})
        method = {"scales": [0.5, 1.0], "mask": {"keep": 0.5}} | sections.pop("method", {})
        recipe = make_recipe(model=FAMILIES[family], engine=engine, method=method, **sections)
        with torch.device("meta"):
            student = build_segmenter(
                num_classes=3, checkpoint_activations=recipe.engine.activation_checkpointing, **FAMILIES[family]
            )
        if freeze is not None:
            student.freeze(freeze)
        return Subject(recipe, student, None, images, images, device)

    return make
