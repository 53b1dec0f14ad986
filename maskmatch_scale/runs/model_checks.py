"""What is refused by the backbone's name or once the student is built: by a run before it starts, and by a plan.

Decision: docs/decisions/0025-unsound-combinations-as-rows.md.
Decision: docs/decisions/0031-capabilities-asked-of-the-family.md.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskmatch_scale.errors import UserError
from maskmatch_scale.method.bases import base_class
from maskmatch_scale.models import Segmenter
from maskmatch_scale.models.families import check_capabilities
from maskmatch_scale.models.heads import SegformerHead
from maskmatch_scale.models.units import visible_count
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.recipe.bases import has_unlabelled_loss
from maskmatch_scale.runs.evaluate import window_px


def check_backbone(recipe: Recipe) -> None:
    """Refuse settings that the backbone's family does not support; nothing is built.

    Raises:
        UserError: names the key and what to do.
    """
    try:
        check_capabilities(
            recipe.model.backbone, compile_blocks=recipe.engine.compile, layer_decay=recipe.optim.layer_decay
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def freeze(recipe: Recipe, student: Segmenter) -> None:
    """Freeze what `optim.freeze` names, before engine, optimizer and teacher are made.

    Raises:
        UserError: the backbone does not have so many layers; names the key and what fits.
    """
    if recipe.optim.freeze is not None:
        try:
            student.freeze(recipe.optim.freeze)
        except ValueError as error:
            raise UserError(f"optim.freeze={recipe.optim.freeze}: {error}") from None


def check_model(recipe: Recipe, student: Segmenter) -> None:
    """Refuse crops and windows that this model cannot take.

    Raises:
        UserError: names the key and the sizes that fit.
    """
    try:
        mask = recipe.method.mask
        for keep in (mask.keep, recipe.method.base_keep):
            if keep is not None:
                visible_count(student.unit_grid(*recipe.data.crop_px), keep)
        if mask.keep is not None and mask.complement:
            rows, cols = grid = student.unit_grid(*recipe.data.crop_px)
            if 2 * (visible := visible_count(grid, mask.keep)) > rows * cols:
                raise ValueError(
                    f"method.mask.complement=true with method.mask.keep={mask.keep}: {visible} visible units of "
                    f"{rows}×{cols} are more than half of them; lower the keep, or take sides of more units"
                )
        student.check_size(*recipe.data.crop_px)
    except ValueError as error:
        raise UserError(f"data.crop_px={list(recipe.data.crop_px)}: {error}") from None
    window_px(recipe, student)
    if recipe.method.views_of == "labelled" and base_class(recipe.method.base).needs_probabilities:
        raise UserError(
            f"method.views_of=labelled with method.base={recipe.method.base}: its loss needs the teacher's "
            "probabilities, and labelled images have labels; use fixmatch"
        )


def check_graphs(recipe: Recipe, student: Segmenter, world_size: int) -> None:
    """Refuse `engine.cuda_graphs` where it cannot run, where a graph would run wrongly, and where it was never tried.

    Raises:
        UserError: names the key and what to do.
    """
    if not recipe.engine.cuda_graphs:
        return
    wrong, remedy = None, "set engine.cuda_graphs=false"
    draws = "draws seeds on the host, which a graph would repeat"
    if not torch.cuda.is_available():
        wrong = "there is no GPU here"
    elif world_size > 1:
        wrong = f"it was not tried on several ranks, and these are {world_size}"
    elif not student.family.captured_whole:
        wrong = f"dropout of a {student.family.title} {draws}"
    elif isinstance(student.head, SegformerHead):
        wrong = f"dropout of model.head={recipe.model.head} {draws}"
        remedy = f"use model.head=linear or dpt, or {remedy}"
    if wrong:
        raise UserError(f"engine.cuda_graphs=true: {wrong}; {remedy}")


def check_statistics(recipe: Recipe, student: Segmenter) -> None:
    """Refuse a run whose average would be evaluated with BatchNorm's running statistics as they are in a new head.

    They come from whole views alone, and so from none where nothing is labelled and the base has no whole view.

    Raises:
        UserError: names the keys and what to do.
    """
    method = recipe.method
    whole = recipe.data.labelled_count != 0 or (has_unlabelled_loss(method.base) and method.base_keep is None)
    if whole or recipe.model.batchnorm == "frozen" or not any(map(_is_new, student.modules())):
        return
    views = f"method.strong_view.keep={method.base_keep}" if method.base_keep else f"method.base={method.base}"
    raise UserError(
        f"data.labelled_count=0 with {views}: the student sees no whole image, which BatchNorm's running statistics "
        "need, and those of its head are new; use a head without BatchNorm (model.head=linear or dpt), or start from a "
        "trained segmenter with this head (model.pretrained)"
    )


def _is_new(module: nn.Module) -> bool:
    """Whether it is a BatchNorm whose running statistics have never changed."""
    if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
        return False
    return bool((module.running_mean == 0).all() and (module.running_var == 1).all())
