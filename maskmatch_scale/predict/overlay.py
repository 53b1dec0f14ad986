"""A prediction in the colours of its classes over its image in grey, with a legend of the classes that occur."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.images.encode import encode_image
from maskmatch_scale.data.tools.overlay import overlaid, percent
from maskmatch_scale.data.tools.sheet import PAPER, LegendRow, legend_picture
from maskmatch_scale.predict.reading import OpenImage
from maskmatch_scale.predict.rows import NO_DATA, Rows

MOST_OVERLAY_PX = 60_000
"""Longest side that an overlay may have: JPEG holds 65,500 px, and below the picture is the legend."""
_NARROWEST_PX = 480
"""Of the picture, so that a legend has room."""
_GAP_PX = 10
_MOST_LEGEND = 60
_QUALITY = 90


class Overlay:
    """Takes the rows of a prediction, and keeps of them as much as the picture shows.

    Args:
        image: that is predicted.
        classes: names.
        palette: RGB, one for each name.
        longest_px: longest side of the picture; a larger image is shrunk to it.
    """

    def __init__(
        self,
        image: OpenImage,
        classes: tuple[str, ...],
        palette: tuple[tuple[int, int, int], ...],
        longest_px: int,
    ) -> None:
        self._image, self._classes, self._palette = image, classes, palette
        height, width = image.size_px
        factor = min(1.0, longest_px / max(height, width))
        self._size = max(1, round(height * factor)), max(1, round(width * factor))
        self._rows, self._columns = (
            ((np.arange(small) + 0.5) * large / small).astype(np.int64)
            for small, large in zip(self._size, (height, width), strict=True)
        )
        self._shown = np.empty(self._size, np.uint8)
        self._pixels = np.zeros(256, np.int64)

    def add(self, rows: Rows) -> None:
        """Take the next rows."""
        self._pixels += np.bincount(rows.classes.ravel(), minlength=256)
        first, last = np.searchsorted(self._rows, (rows.top, rows.top + len(rows.classes)))
        self._shown[first:last] = rows.classes[self._rows[first:last] - rows.top][:, self._columns]

    def jpeg(self) -> bytes:
        """The picture, when all rows have come."""
        pixels: NDArray[np.uint8] = np.asarray(self._image.shrunk(*self._size))
        picture = overlaid(pixels, self._shown, self._palette, NO_DATA, max(self._size))
        legend = legend_picture(self._legend(), max(picture.width, _NARROWEST_PX))
        below = picture.height + _GAP_PX
        whole = Image.new("RGB", (legend.width, below + legend.height), PAPER)
        whole.paste(picture, (0, 0))
        whole.paste(legend, (0, below))
        return encode_image(whole, "JPEG", quality=_QUALITY)

    def _legend(self) -> list[LegendRow]:
        total = math.fsum(self._pixels.tolist())
        rows = []
        for value in np.argsort(-self._pixels, kind="stable")[:_MOST_LEGEND].tolist():
            if self._pixels[value]:
                colour = self._palette[value] if value < len(self._palette) else (205, 205, 205)
                name = self._classes[value] if value < len(self._classes) else f"unnamed {value}"
                name = "no data" if value == NO_DATA else " ".join(name.split())
                rows.append((Image.new("RGB", (26, 18), colour), name, percent(self._pixels[value] / total)))
        return rows
