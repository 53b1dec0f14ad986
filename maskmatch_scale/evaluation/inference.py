"""Prediction of images of any size, whole or in overlapping windows, at one or several scales, mirrored or not.

Training's evaluations, `maskmatch evaluate`, its pictures and `maskmatch predict` use it. It knows no data set: an
image is whatever can be read in parts, so that neither the image nor its probabilities have to be in memory whole.

Decision: docs/decisions/0051-one-way-of-inference.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from maskmatch_scale.errors import UserError
from maskmatch_scale.evaluation.windows import Blend, Block, window_starts
from maskmatch_scale.models import Segmenter
from maskmatch_scale.models.resample import resized, upsampling_rows
from maskmatch_scale.recipe import EvaluationRecipe


class Image(Protocol):
    """An image that is read in parts."""

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width."""

    def read(self, rows: slice, columns: slice) -> Tensor:
        """Pixels of a part that lies within the image: uint8 (C, rows, columns), on any device."""


@dataclass(frozen=True)
class WholeImage:
    """An image that is in memory."""

    pixels: Tensor
    """uint8 (C, H, W)."""

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def read(self, rows: slice, columns: slice) -> Tensor:
        """A view of the pixels."""
        return self.pixels[:, rows, columns]


@dataclass(frozen=True)
class Inference:
    """How a segmenter is run on images."""

    recipe: EvaluationRecipe
    window_px: tuple[int, int]
    """Height and width of a window of the mode `sliding`."""
    patch_px: int
    """Sides of images that the segmenter takes are multiples of it."""
    unit_px: int
    """Sides of images that the segmenter takes are at least this: a SegFormer's attention needs a whole unit."""
    mean: tuple[float, ...]
    """A channel, of values in 0–1: subtracted from images."""
    std: tuple[float, ...]
    """A channel, of values in 0–1: by which images are divided then."""
    device: torch.device
    dtype: torch.dtype = torch.float32
    """Of the images that the segmenter is given."""

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (C, h, w), normalised, in ``dtype`` and on the device."""
        mean, std = self._colours
        return ((pixels.to(self.device, non_blocking=True) / 255 - mean) / std).to(self.dtype)

    @cached_property
    def _colours(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def windows(self, size_px: tuple[int, int]) -> int:
        """Number of windows, and so of blocks, of an image of ``size_px`` (height, width)."""
        tops, lefts, _ = self._cut(size_px)
        return len(tops) * len(lefts)

    def forwards(self, size_px: tuple[int, int]) -> int:
        """Number of calls of the segmenter for an image of ``size_px`` (height, width)."""
        batches = math.ceil(self.windows(size_px) / self.recipe.window_batch)
        return batches * len(self.recipe.scales) * (2 if self.recipe.flip else 1)

    @torch.no_grad()
    def run_empty(self, segmenter: Callable[[Tensor], Tensor], forwards: int) -> None:
        """Call the segmenter on an empty window, so that this rank calls it as often as the others."""
        for _ in range(forwards):
            segmenter(torch.zeros(1, len(self.mean), *self.window_px, device=self.device, dtype=self.dtype))

    @torch.no_grad()
    def blocks(self, segmenter: Callable[[Tensor], Tensor], image: Image) -> Iterator[Block]:
        """Class probabilities, block by block: a softmax of every window, scale and mirror image; then their mean.

        In memory at a time are a batch of windows, their logits, the probabilities of one window, and what of earlier
        windows overlaps with later ones (`windows.Blend`): (share of overlap) · window height · image width · classes
        floats. In the mode `whole` there is one window, and so one block.

        Args:
            segmenter: normalised images (B, C, h, w) to logits, in eval mode. Calls: :meth:`forwards`.
            image: where it is smaller than a window, or in the mode `whole` not whole patches or smaller than a unit,
                it is padded with the mean colour at the bottom and on the right.

        Yields:
            As many blocks as :meth:`windows`. They cover the image, row by row, and do not overlap.
        """
        height, width = image.size_px
        tops, lefts, window_px = self._cut((height, width))
        corners = [(top, left) for top in tops for left in lefts]
        blend = Blend(tops, lefts, window_px)
        for first in range(0, len(corners), self.recipe.window_batch):
            some = corners[first : first + self.recipe.window_batch]
            windows = torch.stack([self._window(image, corner, window_px) for corner in some])
            logits = self._logits(segmenter, windows)
            for number in range(len(some)):
                total = blend.open(logits[0].shape[1], logits[0].device)
                for each in logits:
                    _add_probabilities(total, each[number : number + 1])
                yield blend.close(total).within(height, width)

    def predict(self, segmenter: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """Class of every pixel of a uint8 image (C, H, W): int64 (H, W), on the CPU."""
        return self.predict_confidently(segmenter, pixels)[0]

    def predict_confidently(self, segmenter: Callable[[Tensor], Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Class of every pixel of a uint8 image (C, H, W), and its probability: int64, float32 (H, W), on the CPU."""
        image = WholeImage(pixels.to(self.device, non_blocking=True))
        classes = torch.empty(image.size_px, dtype=torch.int64, device=self.device)
        confidence = torch.empty(image.size_px, device=self.device)
        for block in self.blocks(segmenter, image):
            confidence[block.rows, block.columns], classes[block.rows, block.columns] = block.probabilities.max(0)
        return classes.cpu(), confidence.cpu()

    def _cut(self, size_px: tuple[int, int]) -> tuple[list[int], list[int], tuple[int, int]]:
        """First rows and columns of an image's windows, and their height and width."""
        if self.recipe.mode == "whole":
            patch, least = self.patch_px, self.unit_px / min(1.0, *self.recipe.scales)
            rows, columns = (math.ceil(max(side, least) / patch) * patch for side in size_px)
            return [0], [0], (rows, columns)
        tops, lefts = (
            window_starts(side, window, self.recipe.overlap)
            for side, window in zip(size_px, self.window_px, strict=True)
        )
        return tops, lefts, self.window_px

    def _window(self, image: Image, corner: tuple[int, int], window_px: tuple[int, int]) -> Tensor:
        """A window (C, h, w), normalised, padded with zeros where it ends outside of the image."""
        rows, columns = (
            slice(start, min(start + side, end))
            for start, side, end in zip(corner, window_px, image.size_px, strict=True)
        )
        pixels = self.normalise(image.read(rows, columns))
        return F.pad(pixels, (0, window_px[1] - pixels.shape[2], 0, window_px[0] - pixels.shape[1]))

    def _logits(self, segmenter: Callable[[Tensor], Tensor], windows: Tensor) -> list[Tensor]:
        """Logits (B, classes, h, w) of every scale, and of the mirrored windows, mirrored back."""
        found = []
        for scale in self.recipe.scales:
            images = resized(windows, scale, self.patch_px)
            found.append(segmenter(images))
            if self.recipe.flip:
                found.append(segmenter(images.flip(3)).flip(3))
        return found


def window_of(recipe: EvaluationRecipe, crop_px: tuple[int, int], segmenter: Segmenter) -> tuple[int, int]:
    """Height and width of the windows of a segmenter.

    Args:
        recipe: section of the recipe.
        crop_px: `data.crop_px`.
        segmenter: that is run on them.

    Raises:
        UserError: the segmenter does not take images of this size, or not at the smallest scale; says what it takes.
    """
    size_px = recipe.window_px or crop_px
    try:
        segmenter.check_size(*size_px)
    except ValueError as error:
        raise UserError(f"evaluation.window_px={list(size_px)}: {error}") from None
    scale, unit = min(recipe.scales), segmenter.unit_px
    if recipe.mode == "sliding" and min(size_px) * scale < unit:
        raise UserError(
            f"evaluation.scales={list(recipe.scales)} with windows of {size_px[0]}×{size_px[1]} px: at scale "
            f"{scale:g} they are smaller than a unit of {unit} px; leave it out, or set evaluation.window_px"
        )
    return size_px


def inference_with(
    segmenter: Segmenter, recipe: EvaluationRecipe, crop_px: tuple[int, int], device: torch.device
) -> Inference:
    """How a segmenter is run on images.

    Args:
        segmenter: whose sizes, colours and type of weights are taken.
        recipe: section of the recipe.
        crop_px: `data.crop_px`.
        device: that the segmenter is on.

    Raises:
        UserError: as :func:`window_of`.
    """
    return Inference(
        recipe,
        window_of(recipe, crop_px, segmenter),
        segmenter.patch_px,
        segmenter.unit_px,
        segmenter.mean,
        segmenter.std,
        device,
        next(segmenter.parameters()).dtype,
    )


def described(recipe: EvaluationRecipe, crop_px: tuple[int, int]) -> str:
    """How images are predicted, in words, for records and model cards.

    Args:
        recipe: section of the recipe.
        crop_px: `data.crop_px`.
    """
    height, width = recipe.window_px or crop_px
    text = "whole images"
    if recipe.mode == "sliding":
        text = f"sliding windows of {height}×{width} px overlapping by at least {recipe.overlap:.0%}"
    if recipe.scales != (1.0,):
        text += f", at scales {', '.join(f'{scale:g}' for scale in recipe.scales)}"
    return text + (", and their mirror images" if recipe.flip else "")


def _add_probabilities(total: Tensor, logits: Tensor) -> None:
    """Add to (classes, H, W) the softmax of logits (1, classes, h, w), upsampled in bands of rows."""
    with torch.autocast(logits.device.type, enabled=False):
        for band in upsampling_rows(logits, total.shape[1], total.shape[2]):
            total[:, band.output] += band.upsample(logits)[0].softmax(0)
