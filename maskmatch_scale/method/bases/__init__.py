"""Weak-to-strong bases, to which the masked loss and the multi-scale ensemble are added, one file each.

A base knows its views of the unlabelled images and the loss on them. The mask and the ensemble know no base.

To add one: write NAME.py here with a class derived from `Base`, and add a line to the table in `recipe/bases.py`.
`tests/method/test_bases.py` does so with bases of its own.

Decision: docs/decisions/0032-table-of-bases-in-recipe.md.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from maskmatch_scale.method.pseudo_labels import Probabilities
from maskmatch_scale.method.views import CutMix, Unlabelled, View
from maskmatch_scale.recipe.bases import BASES


@dataclass(frozen=True)
class PseudoLabels:
    """What the teacher says of the weak view."""

    labels: Tensor
    """int64 (U, h, w): ŷ."""
    confident: Tensor
    """bool (U, h, w): c ≥ τ."""
    probabilities: Probabilities | None = None
    """p, for a base with `needs_probabilities`."""
    _mixed: dict[int, PseudoLabels] = field(default_factory=dict, repr=False, compare=False)

    def mixed(self, cutmix: CutMix | None) -> PseudoLabels:
        """The pseudo-labels CutMixed like the images they belong to; each CutMix is applied once and kept."""
        if cutmix is None:
            return self
        if id(cutmix) not in self._mixed:
            probabilities = self.probabilities.mixed(cutmix) if self.probabilities else None
            self._mixed[id(cutmix)] = PseudoLabels(cutmix(self.labels), cutmix(self.confident), probabilities)
        return self._mixed[id(cutmix)]


class Base(ABC):
    """A weak-to-strong method."""

    strong_views: ClassVar[int] = 1
    """How many strong views :meth:`views` asks for: so many are drawn for every image."""
    trained_views: ClassVar[int] = 1
    """How many views :meth:`views` returns: as often the student sees an image (`method.work` counts it)."""
    perturbs_features: ClassVar[bool] = False
    """Whether :meth:`perturb` is called. A seed is then drawn for every image (`Drawn.feature_seeds`)."""
    needs_probabilities: ClassVar[bool] = False
    """Whether :meth:`loss_sum` reads `PseudoLabels.probabilities`; they are kept for no other base."""

    @abstractmethod
    def views(self, unlabelled: Unlabelled) -> tuple[View, ...]:
        """The views that the student is trained on; an empty tuple if the base has no unlabelled loss.

        Args:
            unlabelled: the weak view, and strong views by their number (`Unlabelled.strong_view`).
        """

    def perturb(self, features: Sequence[list[Tensor]], unlabelled: Unlabelled) -> Sequence[list[Tensor]]:
        """Change the student's features of the views, between its backbone and its head.

        Args:
            features: for each view, in the order of :meth:`views`, one tensor a level, finest first: (U, C, h', w'). Of
                views that the student sees in part (`method.strong_view.keep`) the visible units one below the other,
                (U, C, k · r, r) for k units of r × r tokens: other units in each view and image.
            unlabelled: ``drawn.feature_seeds`` are what random numbers should be made from, on the device
                (`channels.coins`).

        Returns:
            As many views and levels, of the same shapes. The given tensors must not be changed in place.
        """
        return features

    @abstractmethod
    def loss_sum(self, logits: Sequence[Tensor], views: Sequence[View], pseudo: PseudoLabels) -> Tensor:
        """Σ over pixels of the loss on all views: float32 scalar.

        Args:
            logits: one (U, classes, h', w') a view.
            views: as :meth:`views` returned them.
            pseudo: of the weak view, not mixed yet.
        """


def build_base(name: str) -> Base:
    """The base that `method.base` names."""
    return base_class(name)()


def base_class(name: str) -> type[Base]:
    """Its class."""
    found: type[Base] = pkgutil.resolve_name(BASES[name].implementation)
    return found
