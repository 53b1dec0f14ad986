"""Mean Teacher: the student's probabilities on a strong view follow the teacher's on the weak one.

Tarvainen and Valpola, NeurIPS 2017, arXiv 1703.01780; with CutMix for segmentation by French et al., BMVC 2020, arXiv
1906.01916. As both papers write it, the square is summed over classes (the first one's code divides it by their
number). Without French et al.'s factor, the share of confident pixels of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maskmatch_scale.method.bases import Base, PseudoLabels
from maskmatch_scale.method.losses import squared_error_sum
from maskmatch_scale.method.views import Unlabelled, View


class MeanTeacher(Base):
    """L_u = (1/|ω|) Σ_ω ‖softmax(S(u_s)) - p‖²."""

    needs_probabilities = True

    def views(self, unlabelled: Unlabelled) -> tuple[View, ...]:
        """One strong view."""
        return (unlabelled.strong_view(0),)

    def loss_sum(self, logits: Sequence[Tensor], views: Sequence[View], pseudo: PseudoLabels) -> Tensor:
        """Squared error on all valid pixels of the strong view, whatever their confidence."""
        probabilities = pseudo.mixed(views[0].cutmix).probabilities
        assert probabilities is not None
        return squared_error_sum(logits[0], probabilities, views[0].valid)
