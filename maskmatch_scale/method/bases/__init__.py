"""Weak-to-strong bases that the masked loss and the multi-scale ensemble attach to, one file each.

A base knows its views of the unlabelled images and the loss on them; the mask and the ensemble know no base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from maskmatch_scale.method.views import CutMix, Unlabelled, View


@dataclass(frozen=True)
class PseudoLabels:
    """What the teacher says of the weak view."""

    labels: Tensor
    """int64 (U, h, w): ŷ."""
    confident: Tensor
    """bool (U, h, w): c ≥ τ."""
    _mixed: dict[int, PseudoLabels] = field(default_factory=dict, repr=False, compare=False)

    def mixed(self, cutmix: CutMix | None) -> PseudoLabels:
        """CutMixed like the images they belong to, once for every user of the same boxes."""
        if cutmix is None:
            return self
        if id(cutmix) not in self._mixed:
            self._mixed[id(cutmix)] = PseudoLabels(cutmix(self.labels), cutmix(self.confident))
        return self._mixed[id(cutmix)]


class Base(Protocol):
    """A weak-to-strong method."""

    def views(self, unlabelled: Unlabelled) -> tuple[View, ...]:
        """The views the student is trained on; an empty tuple if the base has no unlabelled loss."""

    def loss_sum(self, logits: Sequence[Tensor], views: Sequence[View], pseudo: PseudoLabels) -> Tensor:
        """Σ over pixels of the loss on all views: float32 scalar.

        Args:
            logits: one (U, classes, h', w') a view.
            views: as :meth:`views` returned them.
            pseudo: of the weak view, not mixed yet.
        """
