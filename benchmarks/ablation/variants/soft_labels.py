"""The teacher's probabilities as targets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.ablation.variants.base import Variant
from maskmatch_scale.method.bases import PseudoLabels
from maskmatch_scale.method.bases.fixmatch import FixMatch
from maskmatch_scale.method.losses import BandSum, sum_over_bands
from maskmatch_scale.method.pseudo_labels import Probabilities
from maskmatch_scale.method.views import View
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

    def of_band(upsampled: Tensor, rows: slice, wanted: Tensor) -> BandSum:
        counted = pixels[:, None, rows]
        wanted = wanted * counted
        log_p = upsampled.log_softmax(1)
        # The gradient is softmax - p, where a pixel counts.
        return -(wanted * log_p).sum(), lambda: log_p.exp_().mul_(counted).sub_(wanted)

    return sum_over_bands(logits, target.bands_of(logits), of_band)


class SoftLabels(Variant):
    """FixMatch on the teacher's probabilities; the masked loss keeps its labels."""

    def __init__(self, run: Run, steps: int) -> None:
        super().__init__(run, steps)
        assert type(run.maskmatch.base) is FixMatch, "soft labels are FixMatch's"
        run.maskmatch.base = SoftFixMatch()
