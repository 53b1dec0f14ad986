"""The teacher's probabilities as targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.ablation.variants.base import Variant
from maskmatch_scale.method.bases import PseudoLabels
from maskmatch_scale.method.bases.fixmatch import FixMatch
from maskmatch_scale.method.pseudo_labels import Probabilities
from maskmatch_scale.method.views import View
from maskmatch_scale.models.resample import upsampling_rows
from maskmatch_scale.training.run import Run


class SoftFixMatch(FixMatch):
    """L_u = (1/|ω|) Σ_ω 1[c ≥ τ] CE(S(u_s), p): the teacher's probabilities in place of its labels."""

    needs_probabilities = True

    def loss_sum(self, logits: Sequence[Tensor], views: Sequence[View], pseudo: PseudoLabels) -> Tensor:
        """Soft cross-entropy on the confident valid pixels of the strong view."""
        mixed = pseudo.mixed(views[0].cutmix)
        assert mixed.probabilities is not None
        return soft_cross_entropy_sum(logits[0], mixed.probabilities, mixed.confident & views[0].valid)


def soft_cross_entropy_sum(logits: Tensor, target: Probabilities, pixels: Tensor) -> Tensor:
    """Σ over pixels of -Σ over classes of p · log softmax(up(logits)); as `losses.squared_error_sum` otherwise.

    Args:
        logits: float (B, classes, h, w), upsampled bilinearly to the target's size.
        target: p, of the same images and classes.
        pixels: bool (B, H, W): the pixels that count.
    """
    with torch.autocast(logits.device.type, enabled=False):
        total: Tensor = _SoftCrossEntropySum.apply(logits, target, pixels)
    return total


class _SoftCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Probabilities, pixels: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=logits.device)
        gradient = torch.zeros_like(logits, dtype=dtype) if ctx.needs_input_grad[0] else None
        own = upsampling_rows(logits, *target.size_px, target.images_in_band)
        for band, (rows, wanted) in zip(own, target.bands(), strict=True):
            wanted = wanted * pixels[:, None, rows]
            log_p = band.upsample(logits).log_softmax(1)
            total -= (wanted * log_p).sum()
            if gradient is not None:  # softmax - p, where a pixel counts
                band.add_gradient(log_p.exp_().mul_(pixels[:, None, rows]).sub_(wanted), gradient)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * scale).to(ctx.dtype), None, None


class SoftLabels(Variant):
    """FixMatch on the teacher's probabilities; the masked loss keeps its labels."""

    def __init__(self, run: Run, steps: int) -> None:
        super().__init__(run, steps)
        assert type(run.maskmatch.base) is FixMatch, "soft labels are FixMatch's"
        run.maskmatch.base = SoftFixMatch()
