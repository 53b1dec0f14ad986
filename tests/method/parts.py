"""A step of `MaskMatch` in float64 on a tiny model, and all its losses at once."""

import torch
from torch.nn import functional as F

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.method.maskmatch import PARTS, MaskMatch, view_draws
from maskmatch_scale.models import build_segmenter
from tests.conftest import TINY_SEGFORMER, TINY_VIT

MODELS = {
    "segformer": {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER},
    "vit": {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT},
}


def one_step(recipe, model):
    """`MaskMatch` of a recipe, float64, 3 classes."""
    torch.manual_seed(0)
    segmenter = build_segmenter(num_classes=3, image_size=64, **MODELS[model]).double()
    # BatchNorm frozen: a view's logits then do not depend on the other view of its base.
    return MaskMatch(segmenter, recipe.method, recipe.run.seed, 255, batchnorm_frozen=True).double().train()


def first_batch(recipe, module):
    """The first micro-batch of a run, from the recipe's shards."""
    draw = view_draws(module.segmenter, recipe.method, recipe.run.seed, recipe.data.crop_px)
    (batch,) = load_batches(TrainingBatches(recipe, 3, 0, 1, unlabelled=True, draw=draw), 0, 1)
    return batch


def colour_teacher(images):
    """A teacher that gives classes by colour: labels vary within an image, and some of them are confident at 0.7."""
    return 2 * F.instance_norm(F.avg_pool2d(images, 4))


def all_parts(module, step, pseudo, scale):
    """The sum of the losses of a step of `MaskMatch`, and the sums over pixels of its three parts (3,)."""
    loss, sums = 0.0, torch.zeros(3, dtype=torch.float64)
    for part in step.parts:
        of_part, total = module(part, step, pseudo, scale)
        loss, sums[PARTS.index(part)] = loss + of_part, total
    return loss, sums
