"""AdamW's parameter groups."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from maskmatch_scale.models import Segmenter
from maskmatch_scale.recipe import OptimRecipe

_UNDECAYED = ("pos_embed", "cls_token", "reg_token", "dist_token", "mask_token")
"""Endings of the names of parameters that have several dimensions, but are not weights of a layer."""


def parameter_groups(student: nn.Module, recipe: OptimRecipe) -> list[dict[str, Any]]:
    """The trainable parameters in torch's groups, by weight decay and learning rate.

    Biases, norms, class and mask tokens and position embeddings are not decayed. The head and the context decoder
    learn at ``head_lr_multiplier`` times the base rate. With ``layer_decay`` a parameter of layer l of a backbone whose
    deepest layer is L learns at layer_decay^(L - l) times the base rate (BEiT, arXiv 2106.08254); the layers are those
    of `Segmenter.layer_ids`. ``lr_scale`` of a group is its factor on the base rate.

    Args:
        student: a `Segmenter`: its parameters lie under `backbone.`, `head.` and `context.`.
        recipe: the `optim` section.

    Raises:
        ValueError: ``layer_decay`` for a backbone whose layers are not numbered.
    """
    layers = cast(Segmenter, student).layer_ids() if recipe.layer_decay < 1 else {}
    deepest = max(layers.values(), default=0)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            # A parameter that ZeRO-3 has cut has no dimensions of its own.
            decayed = len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and not name.endswith(_UNDECAYED)
            in_backbone = name.startswith("backbone.")
            depth = deepest - layers[name] if layers and in_backbone else 0
            scale = recipe.layer_decay**depth if in_backbone else recipe.head_lr_multiplier
            groups.setdefault((scale, decayed), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": recipe.weight_decay if decayed else 0.0, "lr_scale": scale}
        for (scale, decayed), parameters in groups.items()
    ]


def adamw(groups: list[dict[str, Any]], lr: float, recipe: OptimRecipe, device: torch.device) -> torch.optim.AdamW:
    """Torch's AdamW; on a GPU as one kernel for many parameters (`fused`).

    Args:
        groups: from :func:`parameter_groups`.
        lr: learning rate of the first step.
        recipe: section optim.
        device: of the step.
    """
    return torch.optim.AdamW(groups, lr=lr, betas=recipe.betas, fused=device.type == "cuda" or None)
