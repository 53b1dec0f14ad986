"""A dense-prediction head in the manner of DPT (Ranftl et al., ICCV 2021, arXiv 2103.13413).

Features of four depths of a ViT are reassembled to a pyramid and fused from coarse to fine by RefineNet's residual
convolutions. What differs from the publication: class and register tokens are not read; there is no batch norm; a level
is projected before it is upsampled, which is the same function for a quarter of the work; and the last fusion is not
upsampled further, so that logits come at a quarter of the patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 4


def dpt_width(channels: int) -> int:
    """Width of the fused features for a backbone of so many channels: a sixth of it, in steps of 32, 32 to 256.

    64 for ViT-S and 128 for ViT-B, as in Depth Anything (arXiv 2406.09414). The head always runs on whole images. With
    DPT's 256 for every backbone it would cost more than a small encoder.
    """
    return min(256, max(32, channels // 6 // 32 * 32))


class DptHead(nn.Module):
    """Four levels to logits at the finest fused level.

    Levels that are equally fine (a ViT's) are reassembled to a quarter, a half, once and twice their stride: by
    transposed convolutions, not at all, and by a strided convolution. A pyramid (SegFormer's) is taken as it is.

    Args:
        channels: C of the four levels.
        strides: pixels a cell of the four levels; all equal, or each larger than the one before.
        num_classes: number of classes.
        width: channels of the fused features.
        dropout: before the classifier.

    Raises:
        ValueError: not four levels.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], num_classes: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        if len(channels) != LEVELS:
            raise ValueError(f"head: dpt fuses features of {LEVELS} levels, not of {len(channels)}")
        equal = len(set(strides)) == 1
        self.reassemble = nn.ModuleList(
            _reassembly(c, level, width) if equal else nn.Conv2d(c, width, 3, padding=1, bias=False)
            for level, c in enumerate(channels)
        )
        self.fuse = nn.ModuleList(_Fusion(width, joins=level < LEVELS - 1) for level in range(LEVELS))
        self.hidden = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.apply(_init)
        nn.init.normal_(self.classifier.weight, std=0.02)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features (B, C, h, w), finest first, to logits (B, classes, 4 · h, 4 · w); of a pyramid, (B, classes, h, w).

        Maps may have any size: a coarser one is upsampled to the next finer one's.
        """
        levels = [layer(level) for layer, level in zip(self.reassemble, features)]
        fused: Tensor | None = None
        for layer, level in zip(reversed(self.fuse), reversed(levels)):
            fused = layer(level, fused)
        logits: Tensor = self.classifier(self.dropout(F.relu(self.hidden(fused))))
        return logits


def _reassembly(channels: int, level: int, width: int) -> nn.Sequential:
    """Level 0 … 3 of a ViT, (B, C, h, w), to `width` channels at 4, 2, 1 and ½ times its size, rounded up."""
    # DPT's widths for ViT-B are 96, 192, 384 and 768: the finer, the narrower.
    own = max(width, channels >> (LEVELS - 1 - level))
    resample: list[nn.Module] = []
    if level < 2:
        factor = 4 >> level
        resample = [nn.ConvTranspose2d(own, own, factor, stride=factor)]
    elif level == 3:
        resample = [nn.Conv2d(own, own, 3, stride=2, padding=1)]
    return nn.Sequential(
        nn.Conv2d(channels, own, 1),
        *resample,
        nn.Conv2d(own, width, 3, padding=1, bias=False),
    )


class _Fusion(nn.Module):
    """Adds a level to what coarser levels have been fused to, and refines the sum."""

    def __init__(self, width: int, joins: bool) -> None:
        super().__init__()
        # The coarsest level is joined to nothing, so it needs no layers for that.
        self.project = nn.Conv2d(width, width, 1) if joins else None
        self.level = _Residual(width) if joins else None
        self.sum = _Residual(width)

    def forward(self, level: Tensor, coarser: Tensor | None) -> Tensor:
        """`level` (B, width, h, w) and `coarser` (B, width, any, any) to (B, width, h, w)."""
        if self.project is not None and self.level is not None and coarser is not None:
            # A 1×1 convolution commutes with bilinear upsampling.
            above = F.interpolate(self.project(coarser), size=level.shape[2:], mode="bilinear", align_corners=False)
            level = self.level(level) + above.to(level.dtype)
        refined: Tensor = self.sum(level)
        return refined


class _Residual(nn.Module):
    """RefineNet's residual unit: two 3×3 convolutions, each behind a ReLU (Lin et al., CVPR 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        branch: Tensor = self.second(F.relu(self.first(F.relu(maps))))
        return maps + branch


def _init(module: nn.Module) -> None:
    """Normal weights that keep a signal's size, whatever the width; zero biases."""
    if isinstance(module, nn.Conv2d):
        inputs = module.weight[0].numel()
    elif isinstance(module, nn.ConvTranspose2d):  # patches do not overlap: one tap an output
        inputs = module.in_channels
    else:
        return
    nn.init.normal_(module.weight, std=inputs**-0.5)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
