"""Images to compare two implementations of a segmenter on: held-out ones of a run, given ones, or noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from maskmatch_scale.data.batches.held_out import evaluation_samples
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.bands import Band
from maskmatch_scale.data.images.decode import decode_image
from maskmatch_scale.data.images.file_bands import FileBands
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import DataRecipe
from maskmatch_scale.redact import redacted
from maskmatch_scale.seeds import generator

COUNT = 8
"""Images that are compared, at most."""
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_BANDS_SUFFIXES = (".tif", ".tiff", ".png")


@dataclass(frozen=True)
class Tiles:
    """Pieces of images, each as large as the graph's input."""

    pixels: tuple[Tensor, ...]
    """uint8 (C, H, W) each."""
    source: str
    """What they are, in words."""

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> list[Tensor]:
        """float32 (1, C, H, W) each."""
        shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        return [((pixels / 255 - shift) / scale)[None] for pixels in self.pixels]


def given_tiles(paths: Sequence[Path], size_px: tuple[int, int], bands: Sequence[Band] = ()) -> Tiles:
    """Tiles of image files, or of the images in folders.

    Args:
        paths: the files and folders.
        size_px: height and width.
        bands: of a model of other channels than RGB: its files are TIFFs of these bands.

    Raises:
        UserError: there is no image, or one cannot be read.
    """
    suffixes = _BANDS_SUFFIXES if bands else _SUFFIXES
    files = [
        file
        for path in paths
        for file in (sorted(f for f in path.iterdir() if f.suffix.lower() in suffixes) if path.is_dir() else [path])
    ]
    if not files:
        raise UserError(f"--onnx-images {paths[0]}: no image ({', '.join(suffixes)}) in it")
    found = []
    for file in files[:COUNT]:
        if not file.is_file():
            raise UserError(f"--onnx-images {file}: no such file or folder")
        planes = (
            torch.from_numpy(FileBands(tuple(bands)).read(file, str(file)))
            if bands
            else decode_image(file.read_bytes(), str(file))
        )
        found.append(_centre(planes, size_px))
    return Tiles(tuple(found), f"{_images(len(found))} given by --onnx-images")


def held_out_tiles(data: DataRecipe, size_px: tuple[int, int]) -> Tiles:
    """Tiles of the first images of `dev`, or of `val` if there is no `dev`.

    Raises:
        DataError: the data are not at hand, or have no held-out images.
    """
    index = load_index(data.root, data)
    for split in ("dev", "val"):
        if split in index.streams and index.streams[split].labelled:
            numbers = range(min(COUNT, index.streams[split].samples))
            samples = evaluation_samples(data, split, numbers=numbers)
            found = [_centre(sample.image, size_px) for sample in islice(samples, COUNT)]
            if found:
                return Tiles(tuple(found), f"{_images(len(found))} of the split {split}")
    raise DataError("they have no labelled split dev or val")


def noise_tiles(channels: int, size_px: tuple[int, int], why: str) -> Tiles:
    """Tiles of random pixels, where there are no images.

    Args:
        channels: of an image.
        size_px: height and width.
        why: the reason that there are none.
    """
    draw = generator(0, "tiles of noise")
    pixels = tuple(torch.randint(256, (channels, *size_px), generator=draw, dtype=torch.uint8) for _ in range(COUNT))
    return Tiles(pixels, f"{COUNT} tiles of random noise, no real images ({redacted(why)})")


def _images(count: int) -> str:
    return f"{count} image{'s' if count > 1 else ''}"


def _centre(image: Tensor, size_px: tuple[int, int]) -> Tensor:
    """The centre of an image (C, h, w), or all of it with black at the bottom and on the right: (C, *size_px)."""
    for axis, side in ((1, size_px[0]), (2, size_px[1])):
        start = max(0, (image.shape[axis] - side) // 2)
        image = image.narrow(axis, start, min(side, image.shape[axis]))
    return F.pad(image, (0, size_px[1] - image.shape[2], 0, size_px[0] - image.shape[1]))
