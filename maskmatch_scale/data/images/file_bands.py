"""Which bands of a file are the channels of a model, and images of files as a model with bands sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.images.band_pages import fill_without_data, mapped
from maskmatch_scale.data.images.bands import RGB_NAMES, Band, Channels, choose_channels
from maskmatch_scale.data.images.opening import (
    MOST_WHOLE_PIXELS,
    PNG,
    TIFF_STARTS,
    bad,
    check_size,
    file_faults,
    open_any,
    start_of,
)
from maskmatch_scale.data.images.raster import open_raster

UNUSED = "-"
"""Stands in a list of bands for one that is not used."""


@dataclass(frozen=True)
class FileBands:
    """The channels of a model, and what is said of the bands of its files.

    Args:
        bands: by channel of the model; empty: RGB.
        given: names of the bands of each file, in their order, :data:`UNUSED` for those that are not used; None: not
            said.

    Raises:
        ValueError: ``given`` lacks a channel or has one twice; a line that names it.
    """

    bands: tuple[Band, ...] = ()
    given: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Compare what is given with the channels."""
        if self.given is None:
            return
        for name in self.names:
            if self.given.count(name) != 1:
                how = "is not among them" if name not in self.given else "is there twice"
                raise ValueError(f"the model's channels are {', '.join(self.names)}, and {name!r} {how}")
        for name in self.given:
            if name not in (*self.names, UNUSED):
                what = f"the model has no channel {name!r}, its channels are {', '.join(self.names)}"
                raise ValueError(f"{what}; write {UNUSED} for a band that is not used")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the channels."""
        return tuple(band.name for band in self.bands) or RGB_NAMES

    def places(self, count: int, descriptions: Sequence[str | None], name: str) -> tuple[int, ...]:
        """Which bands of a file the channels are, numbered from 0.

        As was given; else by their descriptions, if each channel has its own; else in their order, if there are as many
        as channels and no description names a channel at another place.

        Args:
            count: number of bands of the file.
            descriptions: what the file calls each of them.
            name: of the file, for the message.

        Raises:
            BadSample: ``not_an_image``: it cannot be told.
        """
        if self.given is not None:
            if len(self.given) != count:
                raise bad("not_an_image", name, f"{_bands(count)}, and --bands names {len(self.given)}")
            return tuple(self.given.index(channel) for channel in self.names)
        called = [" ".join((text or "").split()).casefold() for text in descriptions] or [""] * count
        wanted = [channel.casefold() for channel in self.names]
        if all(called.count(channel) == 1 for channel in wanted):
            return tuple(called.index(channel) for channel in wanted)
        if count == len(wanted) and all(text == own or text not in wanted for text, own in zip(called, wanted)):
            return tuple(range(count))
        what = f"{_bands(count)}, and the model's channels are {', '.join(self.names)}"
        if count < len(wanted):
            raise bad("not_an_image", name, f"{what}; name files that have them all")
        example = ",".join([*self.names, *[UNUSED] * (count - len(wanted))])
        remedy = f"say which band is which, in the order of the file and with {UNUSED} for one that is not used"
        raise bad("not_an_image", name, f"{what}; {remedy}, such as --bands {example}")

    def of_pages(self, stored: Sequence[Band]) -> Channels | None:
        """What the decoder makes of images whose pages an index names; None: plain images, as RGB.

        Args:
            stored: bands of the index; empty: plain images.

        Raises:
            ValueError: a channel is not among them.
        """
        ranges = {band.name: (band.low, band.high) for band in self.bands}
        return choose_channels(stored, self.names, ranges)

    def read(self, data: bytes | Path, name: str) -> NDArray[np.uint8]:
        """A whole image, mapped by the ranges of the channels as those of shards are; 0 where it has no data.

        TIFFs and PNGs are read with all their bits, other formats as 8 bits of grey or RGB.

        Args:
            data: the file: its bytes or its path.
            name: of it, for messages.

        Returns:
            uint8 (C, H, W).

        Raises:
            BadSample: ``not_an_image``: no image, damaged, or other bands; ``too_large``.
            UserError: rasterio is not installed.
        """
        if start_of(data).startswith((PNG, *TIFF_STARTS)):
            with open_raster(data, name) as raster:
                check_size(*raster.size_px, name, MOST_WHOLE_PIXELS)
                places = self.places(raster.count, raster.descriptions, name)
                stored = fill_without_data(raster.read(places), raster.valid(places), self.bands)
                return mapped(stored, self.bands)
        with file_faults(name, "not_an_image", "image"), open_any(data) as image:
            places = self.places(len(image.getbands()), (), name)
            if image.mode not in ("L", "LA", "RGB", "RGBA"):
                raise bad("not_an_image", name, f"mode {image.mode}; of TIFF and PNG other bands are read too")
            pixels = np.atleast_3d(np.asarray(image))
        return mapped(pixels[:, :, places].transpose(2, 0, 1), self.bands)


RGB_FILES = FileBands()
"""Files of a model of RGB, of which nothing is said."""


def _bands(count: int) -> str:
    return f"{count} band{'s' if count > 1 else ''}"
