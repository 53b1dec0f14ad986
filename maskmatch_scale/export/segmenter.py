"""A segmenter from an export: as any other, and it predicts images of any size, as its run did."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from maskmatch_scale.data.images.band_pages import mapped
from maskmatch_scale.data.images.file_bands import FileBands
from maskmatch_scale.data.images.image import MODES, decode_large
from maskmatch_scale.data.images.raster import KINDS
from maskmatch_scale.evaluation.inference import WholeImage, inference_with
from maskmatch_scale.export.description import Description
from maskmatch_scale.models import Segmenter
from maskmatch_scale.recipe import EvaluationRecipe


class Prediction(NamedTuple):
    """What was predicted for an image, in its own size."""

    classes: NDArray[np.uint8]
    """(H, W): class of every pixel, a number of `Description.classes`."""
    confidence: NDArray[np.float32]
    """(H, W): probability of that class, 0–1."""
    probabilities: NDArray[np.float32] | None
    """(classes, H, W), of sum 1 over the classes; None unless asked for."""


class ExportedSegmenter(Segmenter):
    """A segmenter with the description of its export.

    Args:
        built: the segmenter whose parts it takes over.
        description: of the export.
    """

    def __init__(self, built: Segmenter, description: Description) -> None:
        super().__init__(
            built.family,
            built.encoder,
            built.head,
            built.context,
            built.num_classes,
            description.mean,
            description.std,
            description.channels,
        )
        self.description = description

    def predict(
        self,
        image: str | Path | Image.Image | NDArray[Any],
        *,
        probabilities: bool = False,
        evaluation: EvaluationRecipe | None = None,
    ) -> Prediction:
        """Predict an image of any size, on the device and in the precision of this module's parameters.

        Args:
            image: path of a file, a Pillow image, or RGB as uint8 (H, W, 3). Files and Pillow images are turned as
                their EXIF orientation says if that was done in training (`Description.exif_orientation`), files of
                TIFF never. With `Description.bands`: path of a TIFF or PNG with these bands, or stored values (H, W, C)
                of them in their order, uint8, uint16 or int16.
            probabilities: whether to give the probabilities of all classes, too: 4 bytes a class and pixel.
            evaluation: windows, scales and mirror images; None: those of the run (`Description.evaluation`).

        Raises:
            BadSample: a file that is no image, or has more pixels than 500 million of JPEG or PNG, or 179 million of
                other formats.
            ValueError: another kind of array or Pillow image.
            UserError: the segmenter does not take the windows or scales of ``evaluation``.
        """
        if self.description.bands:
            planes = torch.from_numpy(_band_planes(image, FileBands(self.description.bands)))
        else:
            planes = torch.from_numpy(_planes(image, exif_orientation=self.description.exif_orientation))
        inference = inference_with(
            self, evaluation or self.description.evaluation, self.description.image_size, next(self.parameters()).device
        )
        size = planes.shape[1:]
        classes, confidence = np.empty(size, np.uint8), np.empty(size, np.float32)
        all_of_them = np.empty((self.num_classes, *size), np.float32) if probabilities else None
        for block in inference.blocks(self, WholeImage(planes)):
            best, number = block.probabilities.max(0)
            confidence[block.rows, block.columns] = best.cpu()
            classes[block.rows, block.columns] = number.cpu()
            if all_of_them is not None:
                all_of_them[:, block.rows, block.columns] = block.probabilities.cpu()
        return Prediction(classes, confidence, all_of_them)


def _band_planes(image: str | Path | Image.Image | NDArray[Any], bands: FileBands) -> NDArray[np.uint8]:
    """A channel for each band, uint8 (C, H, W)."""
    if isinstance(image, str | Path):
        return bands.read(Path(image), str(image))
    count = len(bands.bands)
    if not isinstance(image, np.ndarray) or image.dtype.name not in KINDS or image.ndim != 3 or image.shape[2] != count:
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(
            f"image: {what}; give a path, or stored values of {', '.join(bands.names)} as {', '.join(KINDS)} "
            f"(H, W, {count})"
        )
    return mapped(image.transpose(2, 0, 1), bands.bands)


def _planes(image: str | Path | Image.Image | NDArray[Any], *, exif_orientation: bool) -> NDArray[np.uint8]:
    """RGB planes, uint8 (3, H, W)."""
    if isinstance(image, str | Path):
        return decode_large(Path(image), str(image), exif_orientation=exif_orientation)
    if isinstance(image, Image.Image):
        if image.mode not in MODES or image.mode.startswith("I;16"):
            raise ValueError(f"image: Pillow's mode {image.mode}; convert it to 8 bits a channel")
        upright = ImageOps.exif_transpose(image) if exif_orientation else image
        image = np.array(upright.convert("RGB"))
    elif not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image: {what}; give a path, a Pillow image, or RGB as uint8 (H, W, 3)")
    return np.ascontiguousarray(image).transpose(2, 0, 1)
