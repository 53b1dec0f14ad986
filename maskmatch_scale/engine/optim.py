"""AdamW's parameter groups and the learning rate of a step."""

from __future__ import annotations

import math
from typing import Any

from timm.models import group_parameters
from torch import nn

from maskmatch_scale.recipe import OptimRecipe, Recipe

_UNDECAYED = ("pos_embed", "cls_token", "reg_token", "dist_token", "mask_token")
"""Parameters of more than one dimension that are no weights of a layer, by the end of their names."""


def parameter_groups(student: nn.Module, recipe: OptimRecipe) -> list[dict[str, Any]]:
    """The trainable parameters in torch's groups, by weight decay and learning rate.

    Biases, norms, class and mask tokens and position embeddings are not decayed; the head and the context decoder
    take ``head_lr_multiplier``. With ``layer_decay`` a parameter of a ViT of L blocks takes layer_decay^(L - l), l = 0
    for the embeddings, 1 … L for the blocks, L for the final norm, too (BEiT, arXiv 2106.08254; layers as timm numbers
    them). Every group has its share of the base learning rate in ``lr_scale``.

    Args:
        student: a Segmenter (parameters under `backbone.`, `head.`, `context.`).
        recipe: the `optim` section.
    """
    layers = _timm_layers(student) if recipe.layer_decay < 1 else {}
    deepest = max(layers.values(), default=0)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.dim() > 1 and not name.endswith(_UNDECAYED)
            in_backbone = name.startswith("backbone.")
            depth = deepest - layers[name] if layers and in_backbone else 0
            scale = recipe.layer_decay**depth if in_backbone else recipe.head_lr_multiplier
            groups.setdefault((scale, decayed), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": recipe.weight_decay if decayed else 0.0, "lr_scale": scale}
        for (scale, decayed), parameters in groups.items()
    ]


def _timm_layers(student: nn.Module) -> dict[str, int]:
    """Number of the layer that each parameter of a ViT backbone belongs to, by its name in the student."""
    backbone: Any = student.backbone
    layers = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    return {f"backbone.{name}": layer for name, layer in layers.items()}


def base_lr(recipe: Recipe, world_size: int) -> float:
    """Peak learning rate of the backbone: `optim.lr`, scaled with the batch if `optim.lr_reference_batch` says so.

    The linear scaling rule (Goyal et al., arXiv 1706.02677): lr · (labelled images a step over all ranks) / reference.
    """
    reference = recipe.optim.lr_reference_batch
    images = recipe.engine.micro_batch * recipe.engine.accumulation * world_size
    return recipe.optim.lr * (images / reference if reference else 1.0)


def lr_factor(step: int, steps: int, recipe: OptimRecipe) -> float:
    """Share of the peak learning rate at optimizer step ``step`` (from 0) of ``steps``."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    if recipe.schedule == "poly":
        return math.pow(1 - done, recipe.poly_power)
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
