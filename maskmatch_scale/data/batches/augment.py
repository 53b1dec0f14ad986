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

Window = tuple[int, int]
"""The first row (or column) of the image that a crop shows, and how many it shows."""


@dataclass(frozen=True)
class WeakView:
    """Draws weak views.

    Attributes:
        crop_px: (h, w) of a view.
        scale_range: least and greatest factor by which an image is resized.
        flip_probability: of a mirrored view.
        ignore_index: label value of padding.
        margin_px: px around the crop on each side that the image of a view has as well. Crops do not depend on it.
    """

    crop_px: tuple[int, int]
    scale_range: tuple[float, float]
    flip_probability: float
    ignore_index: int
    margin_px: int = 0

    def __call__(
        self, image: Tensor, label: Tensor | None, generator: torch.Generator, around: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Draw one view.

        Args:
            image: uint8 (C, H, W).
            label: uint8 (H, W), or None for an unlabelled image.
            generator: the generator that every number is drawn from.
            around: (y, x) of a pixel of the image that the view must contain.

        Returns:
            image uint8 (C, h + 2 m, w + 2 m) of a crop of (h, w) px with a margin of m px; label uint8 (h, w),
            ignore_index on padding (None for an unlabelled image); valid bool (h, w), False on padding.
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
        view = image.new_zeros(len(image), rows, columns)
        cut = image[:, top : top + inside[0], left : left + inside[1]]
        view[:, : target[0], : target[1]] = F.resize(cut, list(target), InterpolationMode.BILINEAR, antialias=True)
        if self.margin_px:
            view = self._with_margin(view, image, (top, window[0]), (left, window[1]))
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

    def _with_margin(self, crop: Tensor, image: Tensor, rows: Window, columns: Window) -> Tensor:
        """A crop, and around it what the image has there, resized by the same factor.

        Args:
            crop: uint8 (C, h, w), not mirrored.
            image: uint8 (C, H, W).
            rows: of the image that the crop shows.
            columns: likewise.

        Returns:
            uint8 (C, h + 2 m, w + 2 m), zero where the image ends.
        """
        _, height, width = crop.shape
        margin, sides = self.margin_px, image.shape[-2:]
        (top, bottom), (above, below) = _reach(rows, sides[0], height, margin)
        (left, right), (before, after) = _reach(columns, sides[1], width, margin)
        size = [below - above, after - before]
        wide = F.resize(image[:, top:bottom, left:right], size, InterpolationMode.BILINEAR, antialias=True)
        view = image.new_zeros(len(image), height + 2 * margin, width + 2 * margin)
        down, across = max(above, 0), max(before, 0)
        part = wide[:, down - above :, across - before :][:, : view.shape[1] - down, : view.shape[2] - across]
        view[:, down : down + part.shape[1], across : across + part.shape[2]] = part
        # The crop itself, which is resized by itself: it is then the same, bit for bit, whatever the margin.
        view[:, margin : margin + height, margin : margin + width] = crop
        return view

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


def _reach(window: Window, side: int, crop: int, margin: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """What of an image's rows (or columns) a margin reaches, and where in the view that is.

    Args:
        window: of the crop.
        side: rows (or columns) of the image.
        crop: rows (or columns) of the crop, px.
        margin: px of the view.

    Returns:
        The first row of the image, and the one after the last; the rows of the view where these two begin, rounded to
        whole px. They may lie outside the view, because whole rows of the image are taken.
    """
    start, rows = window
    beyond = math.ceil(margin * rows / crop)
    first, last = max(0, start - beyond), min(side, start + rows + beyond)
    return (first, last), (margin - round((start - first) * crop / rows), margin + round((last - start) * crop / rows))


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
