"""No unlabelled loss: the baseline. With a mask, the masked loss is then the only loss on unlabelled images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maskmatch_scale.method.bases import Base, PseudoLabels
from maskmatch_scale.method.views import Unlabelled, View


class Supervised(Base):
    """L_u = 0."""

    strong_views = trained_views = 0

    def views(self, unlabelled: Unlabelled) -> tuple[View, ...]:
        """No view."""
        return ()

    def loss_sum(self, logits: Sequence[Tensor], views: Sequence[View], pseudo: PseudoLabels) -> Tensor:
        """Never called: there is no view to take a loss on."""
        raise AssertionError("the supervised base has no views")
