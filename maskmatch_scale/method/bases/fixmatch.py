"""FixMatch for segmentation: on a strong view the student learns to predict what the teacher predicts on the weak one.

As UniMatch's baseline has it (Yang et al., CVPR 2023, arXiv 2208.09910).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maskmatch_scale.method.bases import Base, PseudoLabels
from maskmatch_scale.method.losses import cross_entropy_sum
from maskmatch_scale.method.views import Unlabelled, View


class FixMatch(Base):
    """L_u = (1/|ω|) Σ_ω 1[c ≥ τ] CE(S(u_s), ŷ)."""

    def views(self, unlabelled: Unlabelled) -> tuple[View, ...]:
        """One strong view."""
        return (unlabelled.strong_view(0),)

    def loss_sum(self, logits: Sequence[Tensor], views: Sequence[View], pseudo: PseudoLabels) -> Tensor:
        """Cross-entropy on the confident valid pixels of the strong view."""
        return confident_cross_entropy_sum(logits[0], views[0], pseudo)


def confident_cross_entropy_sum(logits: Tensor, view: View, pseudo: PseudoLabels) -> Tensor:
    """Σ_ω 1[c ≥ τ] CE(S(view), ŷ) of one view, ŷ and c mixed as the view is: float32 scalar.

    Args:
        logits: (U, classes, h', w') of the view.
        view: weak or strong.
        pseudo: of the weak view, not mixed yet.
    """
    mixed = pseudo.mixed(view.cutmix)
    return cross_entropy_sum(logits, mixed.labels, mixed.confident & view.valid)
