"""The weak view: random resize, crop and flip, image and label together.

torchvision's v2 transforms draw from global state, so the parameters are drawn here from an explicit generator and
applied through v2's functional forms. The window is cut out of the source first and resized once: the same view as
resizing the whole image by a factor and cropping, at the cost of the crop alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from maskmatch_scale.seeds import uniform


@dataclass(frozen=True)
class WeakView:
    """What the weak view may do; see the `data` section of the recipe."""

    crop_px: tuple[int, int]
    scale_range: tuple[float, float]
    flip_probability: float
    ignore_index: int

    def __call__(
        self, image: Tensor, label: Tensor | None, source: torch.Generator, around: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One random view.

        Args:
            image: uint8 (3, H, W).
            label: uint8 (H, W), or None for an unlabelled image.
            source: every number is drawn from it.
            around: (y, x) of a pixel of the image that the view must contain.

        Returns:
            image uint8 (3, *crop_px); label uint8 crop_px, ignore_index on padding (None for an unlabelled image);
            valid bool crop_px, False on padding.
        """
        height, width = image.shape[-2:]
        rows, columns = self.crop_px
        low, high = (math.log(bound) for bound in self.scale_range)
        scale = math.exp(uniform(source, low, high))
        window = (max(1, round(rows / scale)), max(1, round(columns / scale)))
        top = self._start(window[0], height, around[0] if around else None, source)
        left = self._start(window[1], width, around[1] if around else None, source)
        mirrored = float(torch.rand((), generator=source)) < self.flip_probability

        # Where the window is larger than the image, what is there is laid top left and the rest is padding.
        inside = (min(window[0], height - top), min(window[1], width - left))
        target = (
            rows if inside[0] == window[0] else max(1, round(inside[0] * rows / window[0])),
            columns if inside[1] == window[1] else max(1, round(inside[1] * columns / window[1])),
        )
        view = image.new_zeros(3, rows, columns)
        cut = image[:, top : top + inside[0], left : left + inside[1]]
        view[:, : target[0], : target[1]] = F.resize(cut, list(target), InterpolationMode.BILINEAR, antialias=True)
        valid = torch.zeros(rows, columns, dtype=torch.bool)
        valid[: target[0], : target[1]] = True
        target_label = None
        if label is not None:
            target_label = torch.full((rows, columns), self.ignore_index, dtype=torch.uint8)
            piece = label[None, top : top + inside[0], left : left + inside[1]]
            target_label[: target[0], : target[1]] = F.resize(piece, list(target), InterpolationMode.NEAREST_EXACT)[0]
        if mirrored:
            view, valid = view.flip(-1), valid.flip(-1)
            target_label = target_label.flip(-1) if target_label is not None else None
        return view, target_label, valid

    @staticmethod
    def _start(window: int, side: int, pixel: int | None, source: torch.Generator) -> int:
        """First row (or column) of the window, drawn uniformly among those that are allowed."""
        low, high = 0, max(0, side - window)
        if pixel is not None:
            low, high = max(low, pixel - window + 1), min(high, pixel)
        return int(torch.randint(low, high + 1, (), generator=source))


def rare_class_pixel(label: Tensor, class_weight: Tensor, source: torch.Generator) -> tuple[int, int] | None:
    """A pixel of a class drawn by weight among the classes of this label map (rare-class sampling of DAFormer).

    Args:
        label: uint8 (H, W).
        class_weight: float (classes,), any scale; classes that the map lacks are left out.
        source: the generator.

    Returns:
        (y, x), or None if the map holds no class of positive weight.
    """
    counts = torch.bincount(label.flatten().long(), minlength=len(class_weight))[: len(class_weight)]
    weight = class_weight * (counts > 0)
    if not bool(weight.any()):
        return None
    drawn = int(torch.multinomial(weight, 1, generator=source))
    number = int(torch.randint(int(counts[drawn]), (), generator=source))
    flat = int((label.flatten() == drawn).nonzero()[number])
    return flat // label.shape[1], flat % label.shape[1]
