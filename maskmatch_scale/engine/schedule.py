"""The learning rate of a step, and the other settings that a recipe gives to AdamW's parameter groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from maskmatch_scale.recipe import OptimRecipe, Recipe


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


class GroupSettings:
    """The recipe's learning rate, weight decay and betas for every parameter group.

    Args:
        groups: what `optim.parameter_groups` made; the order is that of the optimizer's groups.
        recipe: sections optim, engine and run are read.
        world_size: number of ranks.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], recipe: Recipe, world_size: int) -> None:
        self.base_lr = base_lr(recipe, world_size)
        self._recipe = recipe
        self._groups = [{key: group[key] for key in ("lr_scale", "weight_decay")} for group in groups]

    def lr(self, step: int) -> float:
        """Learning rate of the backbone (of its deepest layer) at optimizer step ``step``, from 0."""
        return self.base_lr * lr_factor(step, self._recipe.run.steps, self._recipe.optim)

    def set_lr(self, optimizer_groups: Sequence[dict[str, Any]], step: int) -> None:
        """Give every group its learning rate for optimizer step ``step``."""
        for group, own in zip(optimizer_groups, self._groups, strict=True):
            group["lr"] = own["lr_scale"] * self.lr(step)
