"""UniMatch: FixMatch with two strong views, and the weak view with perturbed features.

Yang et al., CVPR 2023, arXiv 2208.09910. Two things differ from their code: labels come from the averaged teacher as
for every base here (theirs from the student), and channels are dropped on all levels that the head is given (theirs:
the two that DeepLabV3+ reads).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maskmatch_scale.method.bases import Base, PseudoLabels
from maskmatch_scale.method.bases.fixmatch import confident_cross_entropy_sum
from maskmatch_scale.method.channels import coins, times_channels
from maskmatch_scale.method.views import Unlabelled, View

_WEIGHTS = (0.25, 0.25, 0.5)
"""μ/2, μ/2 and λ with λ = μ = 0.5, of the means over the views' pixels."""


class UniMatch(Base):
    """L_u = μ/2 (L_s1 + L_s2) + λ L_fp, each the mean over its view's valid pixels of 1[c ≥ τ] CE(S(view), ŷ).

    Our divisor is Σ_v |ω_v|, |ω_v| being the valid pixels of a view. So the sums are multiplied by three times their
    weights: exactly the formula above where all views have equally many valid pixels. Where they do not, which needs
    padding and CutMix, a view counts by |ω_v| / mean |ω_v|.
    """

    strong_views = 2
    trained_views = 3
    perturbs_features = True

    def views(self, unlabelled: Unlabelled) -> tuple[View, ...]:
        """Two strong views and the weak one."""
        return unlabelled.strong_view(0), unlabelled.strong_view(1), unlabelled.weak

    def perturb(self, features: Sequence[list[Tensor]], unlabelled: Unlabelled) -> Sequence[list[Tensor]]:
        """Each channel of the weak view's features is 0 or doubled (dropout, p = 0.5), every level by itself."""
        first, second, weak = features
        seeds = unlabelled.drawn.feature_seeds
        dropped = [times_channels(level, 2 * coins(seeds, stream, level.shape[1])) for stream, level in enumerate(weak)]
        return first, second, dropped

    def loss_sum(self, logits: Sequence[Tensor], views: Sequence[View], pseudo: PseudoLabels) -> Tensor:
        """Weighted sum of the three views' cross-entropies."""
        first, second, weak = (
            weight * len(_WEIGHTS) * confident_cross_entropy_sum(own, view, pseudo)
            for weight, own, view in zip(_WEIGHTS, logits, views, strict=True)
        )
        return first + second + weak
