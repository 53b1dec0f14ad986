"""Samples as small pictures: an image, its label map over it in the colours of the index, and what the colours mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.tools.sheet import PAPER, LegendRow

_IGNORED, _IGNORED_STRIPE = (205, 205, 205), (120, 120, 120)
_STRIPE_PX = 6
_STRENGTH = 0.75
"""Share of a class's colour in the overlay; the rest is the image in grey."""
_BAND_ROWS = 256
_MOST_LEGEND = 60


def thumbnail(image: Image.Image, longest: int) -> Image.Image:
    """An image shrunk to a longest side of ``longest`` px. A small one is enlarged by a whole factor, not smoothed."""
    factor = longest / max(image.size)
    if factor >= 1:
        grown = int(factor)
        return image.resize((image.width * grown, image.height * grown), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)


def overlaid(
    image: NDArray[np.uint8],
    label: NDArray[np.uint8],
    palette: Sequence[tuple[int, int, int]],
    ignore_index: int,
    longest: int,
) -> Image.Image:
    """A label map in colours over its image in grey, as a thumbnail. Ignored pixels are striped.

    Args:
        image: uint8 (H, W, 3).
        label: uint8 (H, W).
        palette: RGB by class.
        ignore_index: value of pixels without a class.
        longest: side of the thumbnail, px.
    """
    colours = np.full((256, 3), _IGNORED, np.float32)
    colours[: len(palette)] = palette
    over = np.empty(image.shape, np.uint8)
    for top in range(0, len(image), _BAND_ROWS):  # in bands, because these are 12 bytes a pixel, several times
        rows = slice(top, top + _BAND_ROWS)
        grey = image[rows].mean(axis=2, dtype=np.float32)[..., None]
        share = np.where(label[rows] == ignore_index, 1, np.float32(_STRENGTH))[..., None]
        over[rows] = share * colours[label[rows]] + (1 - share) * grey
    picture = np.array(thumbnail(Image.fromarray(over), longest))
    ignored = np.array(thumbnail(Image.fromarray((label == ignore_index).astype(np.uint8) * 255), longest)) > 127
    picture[ignored & _stripes(*ignored.shape)] = _IGNORED_STRIPE
    return Image.fromarray(picture)


def _stripes(height: int, width: int) -> NDArray[np.bool_]:
    down, right = np.ogrid[:height, :width]
    return np.asarray((down + right) % _STRIPE_PX < 2)


def legend(index: ShardIndex, pixels: NDArray[np.int64]) -> list[LegendRow]:
    """A row for every class, with its share of the pixels.

    Args:
        index: names and colours.
        pixels: int64 (256,), number of pixels by label value.
    """
    counted = max(1, int(pixels[: len(index.classes)].sum()))
    rows = [
        (Image.new("RGB", (26, 18), colour), f"{value} {' '.join(name.split())}", percent(int(pixels[value]) / counted))
        for value, (name, colour) in enumerate(zip(index.classes, index.palette, strict=True))
    ][:_MOST_LEGEND]
    if len(index.classes) > _MOST_LEGEND:
        rows.append((Image.new("RGB", (26, 18), PAPER), f"… {len(index.classes) - _MOST_LEGEND} more", ""))
    if pixels[index.ignore_index]:
        swatch = np.full((18, 26, 3), _IGNORED, np.uint8)
        swatch[_stripes(18, 26)] = _IGNORED_STRIPE
        share = int(pixels[index.ignore_index]) / int(pixels.sum())
        rows.append((Image.fromarray(swatch), f"{index.ignore_index} ignored", f"{percent(share)} of all"))
    return rows


def percent(share: float) -> str:
    """A share of 0 to 1 in words."""
    if share == 0:
        return "not shown"
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}" if share >= 0.0005 else "< 0.1%"
