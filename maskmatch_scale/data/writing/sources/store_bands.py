"""Images of named bands as they are stored: a TIFF of one grey page a band, with the values as they were measured."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.band_pages import encode_pages, fill_without_data
from maskmatch_scale.data.images.bands import Band
from maskmatch_scale.data.images.opening import PNG, TIFF_STARTS, file_faults, open_any, start_of
from maskmatch_scale.data.images.raster import Raster, Window, open_raster
from maskmatch_scale.data.writing.sources.band_options import SKIPPED
from maskmatch_scale.data.writing.sources.store_image import Stored, refuse_huge, shrunk


@dataclass(frozen=True)
class BandRule:
    """How images with bands are read; picklable.

    Attributes:
        names: of all bands of the images, in their order; :data:`SKIPPED` for those that are left out.
        bands: those that are stored, in the same order.
        eight_bits: names of those whose range is 0 to 255 because the images of the sample have 8 bits.
    """

    names: tuple[str, ...]
    bands: tuple[Band, ...]
    eight_bits: frozenset[str]

    @property
    def numbers(self) -> list[int]:
        """Of the bands that are stored, from 0."""
        return [number for number, name in enumerate(self.names) if name != SKIPPED]

    def as_json(self) -> dict[str, object]:
        """What the written shards depend on, for the settings."""
        ranges = {band.name: [band.low, band.high] for band in self.bands}
        return {"bands": ",".join(self.names), "value_ranges": ranges}


class Planes:
    """The bands of an image that Pillow has decoded, with the methods of
    :class:`maskmatch_scale.data.images.raster.Raster`.

    Args:
        pixels: uint8 (H, W, bands).
    """

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._pixels = pixels
        self.size_px: tuple[int, int] = pixels.shape[0], pixels.shape[1]
        self.count: int = pixels.shape[2]
        self.kind = pixels.dtype

    def read(
        self, bands: Sequence[int], shape: tuple[int, int] | None = None, window: Window | None = None
    ) -> NDArray[Any]:
        """Values of bands, (bands, H, W)."""
        pixels = self._pixels[window] if window is not None else self._pixels
        rows, columns = (
            np.arange(to) * of // to for to, of in zip(shape or pixels.shape[:2], pixels.shape[:2], strict=True)
        )
        return np.stack([pixels[:, :, band][rows][:, columns] for band in bands])

    def valid(self, bands: Sequence[int], shape: tuple[int, int] | None = None, window: Window | None = None) -> None:
        """All pixels have data."""


@contextmanager
def open_bands(data: bytes | Path, name: str, names: Sequence[str]) -> Generator[Raster | Planes, None, None]:
    """Open an image of bands while the body runs: a TIFF or PNG with all its bits, any other with 8.

    Args:
        data: the file: its bytes or its path.
        name: of it, for the message.
        names: of its bands.

    Raises:
        BadSample: it cannot be read, or has another number of bands.
    """
    start = start_of(data)
    if not start:
        raise BadSample("empty", f"{name}: a file of no bytes")
    if start.startswith((*TIFF_STARTS, PNG)):
        with open_raster(data, name) as raster:
            _check_count(raster.count, names, name)
            yield raster
        return
    with file_faults(name, "not_an_image", "image"), open_any(data) as image:
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            raise BadSample("not_an_image", f"{name}: mode {image.mode}; of TIFF and PNG other bands are read too")
        pixels = np.asarray(image)
    planes = Planes(pixels if pixels.ndim == 3 else pixels[:, :, None])
    _check_count(planes.count, names, name)
    yield planes


def read_pages(
    image: Raster | Planes, name: str, rule: BandRule, window: Window | None = None
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """The bands that are kept, and which pixels have data; the others become the low end of each range, so that they
    are read as 0.

    Args:
        image: open.
        name: of the file, for the message.
        rule: which bands.
        window: rows and columns that are read; None: all.

    Returns:
        (bands, h, w) of uint8, uint16 or int16; bool (h, w), or None: all have data.

    Raises:
        BadSample: `not_an_image`.
    """
    if rule.eight_bits and image.kind != np.uint8:
        what = f"values of type {image.kind}, but others have 8 bits"
        raise BadSample("not_an_image", f"{name}: {what}; --value-range LOW:HIGH says which values become 0 and 255")
    pages, known = image.read(rule.numbers, window=window), image.valid(rule.numbers, window=window)
    return fill_without_data(pages, known, rule.bands), known


def store_bands(
    data: bytes, name: str, rule: BandRule, *, max_side: int | None = None
) -> tuple[Stored, NDArray[np.bool_] | None]:
    """An image as a TIFF of the bands that are kept, and which of its pixels have data.

    An image larger than `max_side` is shrunk. It is not turned, whatever its tag `Orientation` says.

    Args:
        data: the bytes of the file.
        name: of the file, for the message.
        rule: which bands.
        max_side: longest side, px; None: any.

    Returns:
        The image; bool (H, W) of the file that was read, or None: all have data.

    Raises:
        BadSample: `empty`, `not_an_image` or `too_large`.
    """
    with open_bands(data, name, rule.names) as image:
        height, width = image.size_px
        size = (width, height)
        if max_side is not None and max(size) > max_side:
            size = shrunk(size, max_side)
        refuse_huge(size, name)
        pages, known = read_pages(image, name, rule)
    if size != (width, height):
        pages = np.stack([_resized(page, size) for page in pages])
    return Stored(encode_pages(list(pages)), "tif", size, (width, height)), known


def _resized(page: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """A band (H, W) in another size (width, height)."""
    limits = np.iinfo(page.dtype)
    resized = Image.fromarray(page.astype(np.float32)).resize(size, Image.Resampling.LANCZOS)
    values: NDArray[Any] = np.rint(np.asarray(resized)).clip(limits.min, limits.max).astype(page.dtype)
    return values


def _check_count(found: int, names: Sequence[str], name: str) -> None:
    if found != len(names):
        what = f"{found} band{'s' * (found != 1)}, but --bands {','.join(names)} names {len(names)}"
        raise BadSample("not_an_image", f"{name}: {what} ({SKIPPED} leaves a band out)")
