"""The learning rate of a step, and what else the recipe says of an optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maskmatch_scale.engine.optim import base_lr, lr_factor
from maskmatch_scale.recipe import Recipe


class GroupSettings:
    """Learning rate, weight decay and betas of every parameter group, by the recipe.

    They are kept apart from the optimizer: a loaded checkpoint brings groups of its own, but the recipe decides.

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

    def restore(self, optimizer_groups: Sequence[dict[str, Any]]) -> None:
        """Put back what a loaded checkpoint has replaced."""
        for group, own in zip(optimizer_groups, self._groups, strict=True):
            group.update(own, betas=self._recipe.optim.betas)
