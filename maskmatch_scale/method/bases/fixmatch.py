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
        mixed = pseudo.mixed(views[0].cutmix)
        return cross_entropy_sum(logits[0], mixed.labels, mixed.confident & views[0].valid)
