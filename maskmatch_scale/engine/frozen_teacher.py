"""A frozen teacher: another trained segmenter that labels for the student, in place of the average of it.

It may be of any family and size. Every rank holds it whole, in fp32, at every ZeRO stage; nothing is sent for it.

Decision: docs/decisions/0062-frozen-teacher.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskmatch_scale.engine.precision import autocast, autocast_dtype
from maskmatch_scale.models import Segmenter
from maskmatch_scale.recipe import Recipe


class FrozenTeacher:
    """A segmenter in eval mode, without gradients, with its own normalisation and the arithmetic of the run.

    Args:
        segmenter: trained, fp32, in host memory; it is moved to the device.
        recipe: of the run; its precision is that of the forward, as for the average.
        device: of this rank.
    """

    def __init__(self, segmenter: Segmenter, recipe: Recipe, device: torch.device) -> None:
        self.module = segmenter.eval().requires_grad_(False).to(device)
        self.patch_px = segmenter.patch_px
        self._dtype = autocast_dtype(recipe)
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (segmenter.mean, segmenter.std)
        )

    def normalise(self, images: Tensor) -> Tensor:
        """Values 0–1 (B, C, H, W) to what this segmenter was trained with, in the dtype of its weights."""
        return ((images - self._mean) / self._std).to(next(self.module.parameters()).dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) to logits (B, classes, h, w)."""
        with autocast(images.device, self._dtype):
            logits: Tensor = self.module(images)
        return logits
