"""Pseudo-labels of the whole image from a multi-scale ensemble, as in the paper; scales and rounding are our choice.

Decision: docs/decisions/0016-bands-and-chunks.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskmatch_scale.method.views import CutMix
from maskmatch_scale.models.resample import RowBand, resized, upsampling_rows


@dataclass(frozen=True)
class Probabilities:
    """p = mean over q of softmax(up(T(resize(u_w, q)))), of every pixel.

    What is kept are the logits of each scale at their own resolution. The probabilities are made from them in bands of
    rows, each time they are read: whole they would be classes × H × W float32 numbers an image.
    """

    logits: tuple[Tensor, ...]
    """(U, classes, h, w) one a scale; with a `cutmix` U or U + 1 images, as `CutMix.with_partners` gives them."""
    size_px: tuple[int, int]
    """(H, W), without the margin."""
    cutmix: CutMix | None = None
    """How they are mixed; None: they are not."""
    margin_px: int = 0
    """Px around these pixels on each side that the logits stand for as well; p is not made there."""

    def mixed(self, cutmix: CutMix) -> Probabilities:
        """The probabilities mixed like the images they belong to.

        With a neighbour all ranks must call it together. Logits are exchanged, not probabilities.
        """
        assert self.cutmix is None
        return replace(self, logits=tuple(cutmix.with_partners(own) for own in self.logits), cutmix=cutmix)

    def bands(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and p of each band: (U, classes, rows, W), at least float32. The caller switches autocast off."""
        cut = [upsampling_rows(own, *self.size_px, margin=self.margin_px) for own in self.logits]
        for bands in zip(*cut, strict=True):
            total = bands[0].upsample(self.logits[0]).softmax(1)
            for band, own in zip(bands[1:], self.logits[1:], strict=True):
                total += band.upsample(own).softmax(1)
            total.div_(len(self.logits))
            rows = bands[0].output
            yield rows, total if self.cutmix is None else self.cutmix.mix(total, rows)

    def bands_of(self, logits: Tensor) -> Iterator[tuple[RowBand, Tensor]]:
        """Bands that upsample a student's logits (U, classes, h, w) to these pixels, each with its p."""
        own = upsampling_rows(logits, *self.size_px, len(self.logits[0]))  # U + 1 images with a neighbour's
        for band, (_, p) in zip(own, self.bands(), strict=True):
            yield band, p

    def labels(self) -> tuple[Tensor, Tensor]:
        """ŷ = argmax p, int64 (U, H, W), and c = max p, at least float32 (U, H, W), 0–1; of what is not mixed."""
        assert self.cutmix is None
        first = self.logits[0]
        labels = torch.empty(len(first), *self.size_px, dtype=torch.int64, device=first.device)
        confidence = torch.empty_like(labels, dtype=torch.promote_types(first.dtype, torch.float32))
        with torch.autocast(first.device.type, enabled=False):
            for rows, p in self.bands():
                torch.max(p, dim=1, out=(confidence[:, rows], labels[:, rows]))
        return labels, confidence


@torch.no_grad()
def multi_scale_probabilities(
    segmenter: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float], margin_px: int = 0
) -> Probabilities:
    """The teacher's p of the weak view.

    Args:
        segmenter: the teacher, in the mode (train or eval) that the caller has put it in. Sides of resized images are
            rounded to multiples of its ``patch_px``, if it has one.
        images: float (B, C, H + 2 m, W + 2 m), normalised, the weak view and its margin.
        scales: Q; a resized side is at least one patch.
        margin_px: m; what the teacher says of the margin is left out.
    """
    patch_px = int(getattr(segmenter, "patch_px", 1))
    logits = tuple(segmenter(resized(images, scale, patch_px)) for scale in scales)
    size_px = (images.shape[2] - 2 * margin_px, images.shape[3] - 2 * margin_px)
    return Probabilities(logits, size_px, margin_px=margin_px)


@torch.no_grad()
def multi_scale_pseudo_labels(
    segmenter: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float], margin_px: int = 0
) -> tuple[Tensor, Tensor]:
    """ŷ, int64 (B, H, W), and c, float32 (B, H, W) in 0–1; arguments as of `multi_scale_probabilities`."""
    return multi_scale_probabilities(segmenter, images, scales, margin_px).labels()
