"""The weak view: random resize, crop and flip, of image and label map together.

The v2 transforms of torchvision draw from global state. So the parameters are drawn here, from an explicit generator,
and applied by the functional forms of v2. A window is cut out of the image first, and then resized to the size of the
crop. That gives the same view as resizing the whole image by a factor and cropping it, but only the crop is resized.

Decision: docs/decisions/0010-weak-view-on-cpu-strong-view-on-device.md.
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
    """Draws weak views.

    Attributes:
        crop_px: (h, w) of a view.
        scale_range: least and greatest factor by which an image is resized.
        flip_probability: of a mirrored view.
        ignore_index: label value of padding.
    """

    crop_px: tuple[int, int]
    scale_range: tuple[float, float]
    flip_probability: float
    ignore_index: int

    def __call__(
        self, image: Tensor, label: Tensor | None, generator: torch.Generator, around: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Draw one view.

        Args:
            image: uint8 (3, H, W).
            label: uint8 (H, W), or None for an unlabelled image.
            generator: the generator that every number is drawn from.
            around: (y, x) of a pixel of the image that the view must contain.

        Returns:
            image uint8 (3, *crop_px); label uint8 crop_px, ignore_index on padding (None for an unlabelled image);
            valid bool crop_px, False on padding.
        """
        height, width = image.shape[-2:]
        rows, columns = self.crop_px
        low, high = (math.log(bound) for bound in self.scale_range)
        scale = math.exp(uniform(generator, low, high))
        window = (max(1, round(rows / scale)), max(1, round(columns / scale)))
        top = self._start(window[0], height, around[0] if around else None, generator)
        left = self._start(window[1], width, around[1] if around else None, generator)
        mirrored = float(torch.rand((), generator=generator)) < self.flip_probability

        # If the window is larger than the image, the image is put in its top left corner, and the rest is padding.
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
    def _start(window: int, side: int, pixel: int | None, generator: torch.Generator) -> int:
        """First row (or column) of the window, drawn uniformly from those that are allowed.

        Args:
            window: rows (or columns) of the window, px.
            side: rows (or columns) of the image, px.
            pixel: row (or column) that the window must contain, or None.
            generator: the generator.
        """
        low, high = 0, max(0, side - window)
        if pixel is not None:
            low, high = max(low, pixel - window + 1), min(high, pixel)
        return int(torch.randint(low, high + 1, (), generator=generator))


def rare_class_pixel(label: Tensor, class_weight: Tensor, generator: torch.Generator) -> tuple[int, int] | None:
    """Draw a class of this label map by weight, and a pixel of that class (rare-class sampling of DAFormer).

    Args:
        label: uint8 (H, W).
        class_weight: float (classes,), of any scale; classes that are not in the map are left out.
        generator: the generator.

    Returns:
        (y, x), or None if no class of the map has a positive weight.
    """
    counts = torch.bincount(label.flatten().long(), minlength=len(class_weight))[: len(class_weight)]
    weight = class_weight * (counts > 0)
    if not bool(weight.any()):
        return None
    drawn = int(torch.multinomial(weight, 1, generator=generator))
    number = int(torch.randint(int(counts[drawn]), (), generator=generator))
    flat = int((label.flatten() == drawn).nonzero()[number])
    return flat // label.shape[1], flat % label.shape[1]
