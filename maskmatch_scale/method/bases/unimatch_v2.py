"""UniMatch V2: FixMatch with two strong views whose features are dropped in complementary channels.

Yang et al., 2024, arXiv 2410.10777. One thing differs from their code: an image keeps all its channels with probability
0.5, each by itself; there it is exactly half of the images of a rank's batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maskmatch_scale.method.bases import Base, PseudoLabels
from maskmatch_scale.method.bases.fixmatch import confident_cross_entropy_sum
from maskmatch_scale.method.channels import coins, times_channels
from maskmatch_scale.method.views import Unlabelled, View

_MASK, _DROPPED = range(2)
"""Streams of coins: the mask over channels, and whether an image is dropped at all."""


class UniMatchV2(Base):
    """L_u = (L_s1 + L_s2) / 2, each the mean over its view's valid pixels of 1[c ≥ τ] CE(S(view), ŷ).

    Our divisor is |ω_1| + |ω_2|, so the sums are added as they are: exactly the formula above where both views have
    equally many valid pixels.
    """

    strong_views = trained_views = 2
    perturbs_features = True

    def views(self, unlabelled: Unlabelled) -> tuple[View, ...]:
        """Two strong views."""
        return unlabelled.strong_view(0), unlabelled.strong_view(1)

    def perturb(self, features: Sequence[list[Tensor]], unlabelled: Unlabelled) -> Sequence[list[Tensor]]:
        """View 1 times 2 M, view 2 times 2 - 2 M, for M ~ Bernoulli(0.5) a channel; half of the images as they are.

        One M for all levels, as all levels of a ViT have the same channels. A level with fewer channels, of a
        SegFormer, takes the first of M.
        """
        seeds = unlabelled.drawn.feature_seeds
        dropped = coins(seeds, _DROPPED, 1)

        def factors(level: Tensor) -> Tensor:
            return (2 * coins(seeds, _MASK, level.shape[1])).where(dropped, 1)

        first, second = features
        return (
            [times_channels(level, factors(level)) for level in first],
            [times_channels(level, 2 - factors(level)) for level in second],
        )

    def loss_sum(self, logits: Sequence[Tensor], views: Sequence[View], pseudo: PseudoLabels) -> Tensor:
        """Sum of the two views' cross-entropies."""
        first, second = (
            confident_cross_entropy_sum(own, view, pseudo) for own, view in zip(logits, views, strict=True)
        )
        return first + second
