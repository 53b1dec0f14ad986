"""AdamW's parameter groups and the learning rate of a step."""

from __future__ import annotations

import math

import torch
from torch import nn

from maskmatch_scale.recipe import OptimRecipe


def build_optimizer(student: nn.Module, recipe: OptimRecipe) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in up to four groups.

    Biases, norms, class and mask tokens and position embeddings are not decayed; the head and the context decoder
    take ``head_lr_multiplier``. Every group keeps its own peak in ``peak_lr``.

    Args:
        student: a Segmenter (parameters under `backbone.`, `head.`, `context.`).
        recipe: the `optim` section.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.dim() > 1 and not name.endswith(("pos_embed", "cls_token", "reg_token", "mask_token"))
            groups.setdefault((name.startswith("backbone."), decayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": recipe.weight_decay if decayed else 0.0,
                "peak_lr": recipe.lr * (1.0 if in_backbone else recipe.head_lr_multiplier),
            }
            for (in_backbone, decayed), parameters in groups.items()
        ],
        lr=recipe.lr,
        betas=recipe.betas,
    )


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
