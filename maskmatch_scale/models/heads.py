"""Segmentation heads: features of every level, (B, C, h, w), to logits at the finest level or at full resolution.

With `shuffle` r > 1 the classifier gives classes × r² values a cell, laid out as r × r pixels (sub-pixel convolution,
Shi et al., CVPR 2016, arXiv 1609.05158), so that structures thinner than a cell survive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskmatch_scale.models import dpt
from maskmatch_scale.models.classify import norm_relu_classify
from maskmatch_scale.models.dpt import DptHead, dpt_width
from maskmatch_scale.models.resample import upsampled_sum


def build_head(
    name: str, channels: Sequence[int], strides: Sequence[int], num_classes: int, hidden_size: int, dropout: float
) -> nn.Module:
    """Build a head.

    Args:
        name: `segformer`, `linear`, `pixel_shuffle` or `dpt`.
        channels: C of every level, finest first.
        strides: pixels a cell of every level.
        num_classes: number of classes.
        hidden_size: width of the fused features of the `segformer` head; `dpt` derives its own (`dpt.dpt_width`).
        dropout: before the classifier of the `segformer` and `dpt` heads.

    Raises:
        ValueError: no such head, or one that needs another number of levels (`head_levels`).
    """
    build: dict[str, Callable[[], nn.Module]] = {
        "segformer": lambda: SegformerHead(channels, num_classes, hidden_size, dropout),
        "linear": lambda: LinearHead(channels, num_classes),
        # Levels of several resolutions are fused first; a single one needs no fusing.
        "pixel_shuffle": lambda: (
            SegformerHead(channels, num_classes, hidden_size, dropout, strides[0])
            if len(channels) > 1
            else LinearHead(channels, num_classes, strides[0])
        ),
        "dpt": lambda: DptHead(channels, strides, num_classes, dpt_width(channels[-1]), dropout),
    }
    if name not in build:
        raise ValueError(f"head: {name!r} is not one of {', '.join(build)}")
    return build[name]()


def head_levels(name: str) -> int:
    """How many depths of a ViT a head takes features of."""
    return dpt.LEVELS if name == "dpt" else 1


def _pointwise(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1×1 convolution of (B, C, h, w) by weight (out, C), to (B · h · w, out).

    It is computed as a matrix product, which copies nothing in channels-last memory. On one CPU thread torch's
    convolution is slower.
    """
    return F.linear(features.permute(0, 2, 3, 1).flatten(0, 2), weight, bias)


def _as_maps(rows: Tensor, like: Tensor, shuffle: int) -> Tensor:
    """Rows (B · h · w, classes · shuffle²) to maps (B, classes, h · shuffle, w · shuffle), h × w the size of `like`."""
    maps = rows.view(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)
    return F.pixel_shuffle(maps, shuffle)


def _sizes(features: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(level.shape[2], level.shape[3]) for level in features]


def _init(module: nn.Module) -> None:
    """Initialise as transformers does SegFormer: normal weights of deviation 0.02, zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class LinearHead(nn.Module):
    """A linear classifier on all levels, in DINOv2's sense: 1×1 convolution of the concatenated, upsampled features.

    A 1×1 convolution commutes with bilinear upsampling, so every level is classified at its own resolution.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, shuffle: int = 1) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.classifiers = nn.ModuleList(
            nn.Linear(c, num_classes * shuffle**2, bias=level == 0) for level, c in enumerate(channels)
        )
        self.apply(_init)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, classes, h · shuffle, w · shuffle), h × w the finest level's size."""
        classifiers: list[nn.Linear] = list(self.classifiers)  # type: ignore[arg-type]
        levels = [_pointwise(level, c.weight, c.bias) for c, level in zip(classifiers, features)]
        return _as_maps(upsampled_sum(levels, _sizes(features)), features[0], self.shuffle)


class _Projection(nn.Module):
    """Holds `proj` under the name that transformers' `SegformerMLP` gives it."""

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, hidden_size)


class SegformerHead(nn.Module):
    """SegFormer's all-MLP head (arXiv 2105.15203), computed in another order: the same logits for less work.

    The published head projects every level to E channels, upsamples, concatenates to 4·E channels, and fuses them by a
    1×1 convolution. Projection and fusion are linear and commute with upsampling. So here their weights are multiplied
    together once and applied at every level's own resolution, and the tensor of 4·E channels never exists. Parameters
    keep transformers' names (`SegformerDecodeHead`), so its checkpoints load both ways.

    Decision: docs/decisions/0015-segformer-head-reassociated.md.
    Decision: docs/decisions/0024-no-gradient-for-the-bias-before-batchnorm.md.
    """

    weights_in_fp32 = True
    """Under autocast, too: weights are multiplied together before a product with features rounds them."""

    def __init__(
        self, channels: Sequence[int], num_classes: int, hidden_size: int, dropout: float, shuffle: int = 1
    ) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.linear_projections = nn.ModuleList(_Projection(c, hidden_size) for c in channels)
        self.linear_fuse = nn.Conv2d(hidden_size * len(channels), hidden_size, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(hidden_size, num_classes * shuffle**2, 1)
        self.apply(_init)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, classes, h · shuffle, w · shuffle), h × w the finest level's size."""
        weights, bias = self.fused_projections()
        if self.batch_norm.training:
            # BatchNorm subtracts the batch's mean, and with it any constant, so this bias has no gradient. Rounding
            # would leave a tiny one, and AdamW would turn it into steps of full size that depend on the ranks.
            bias = bias.detach() + 0 * bias
        # Upsampling does not change a constant, so the sum of levels needs one bias only.
        biases = [bias, *[None] * (len(weights) - 1)]
        levels = [_pointwise(level, weight, b) for level, weight, b in zip(features, weights, biases)]
        hidden = upsampled_sum(levels, _sizes(features))
        logits = norm_relu_classify(hidden, self.batch_norm, self.dropout, self.classifier)
        return _as_maps(logits, features[0], self.shuffle)

    def fused_projections(self) -> tuple[list[Tensor], Tensor]:
        """Weight (E, C) of every level, and the bias (E,) of their sum, in the parameters' own dtype."""
        projections: list[nn.Linear] = [module.proj for module in self.linear_projections]  # type: ignore[misc]
        # The published head concatenates coarsest first.
        fuse = self.linear_fuse.weight.flatten(1).chunk(len(projections), dim=1)[::-1]
        # Both weights are float32 here. Autocast would round their product before it is used.
        with torch.autocast(self.linear_fuse.weight.device.type, enabled=False):
            weights = [f @ projection.weight for f, projection in zip(fuse, projections)]
            bias = torch.stack([f @ projection.bias for f, projection in zip(fuse, projections)]).sum(0)
        return weights, bias
