"""All losses of a step at once."""

import torch

from maskmatch_scale.method.maskmatch import PARTS


def all_parts(module, step, pseudo, scale):
    """The sum of the losses of a step of `MaskMatch`, and the sums over pixels of its three parts (3,)."""
    loss, sums = 0.0, torch.zeros(3, dtype=torch.float64)
    for part in step.parts:
        of_part, total = module(part, step, pseudo, scale)
        loss, sums[PARTS.index(part)] = loss + of_part, total
    return loss, sums
