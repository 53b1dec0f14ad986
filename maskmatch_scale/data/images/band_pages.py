"""Images of bands, as they lie in shards: TIFFs of one grey page a band, encoded and decoded to NumPy arrays.

Bytes may come from anybody: pages are read by Pillow's class for TIFF alone, only those that are wanted, and their size
is checked before anything is decoded. A TIFF of other writers that has its bands interleaved in one page is read by
rasterio.

Decision: docs/decisions/0080-bands-are-stored-as-measured.md.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.bands import Band, Channels
from maskmatch_scale.data.images.opening import MAX_PIXELS, TIFF_STARTS, bad, check_size, quiet, said
from maskmatch_scale.data.images.raster import Raster, open_raster

_BITS, _SAMPLES, _TILE_WIDTH, _TILE_HEIGHT, _PREDICTOR, _SAMPLE_FORMAT = 258, 277, 322, 323, 317, 339
"""Numbers of TIFF tags."""
_HORIZONTAL = 2
"""A predictor: differences of neighbours are compressed."""
_SIGNED = 2
"""A sample format."""
_MANY_PX = 1 << 20
"""Rows of so many pixels are mapped at a time."""


def encode_pages(pages: Sequence[NDArray[Any]]) -> bytes:
    """A TIFF of bands, losslessly compressed; the same bytes every time.

    Args:
        pages: uint8, uint16 or int16 (H, W) each, all of one size and type.
    """
    height, width = pages[0].shape
    kind = pages[0].dtype.newbyteorder("<")
    mode = "L" if kind.itemsize == 1 else "I;16"
    images = [Image.frombytes(mode, (width, height), np.ascontiguousarray(page, kind).tobytes()) for page in pages]
    tags = {_PREDICTOR: _HORIZONTAL} | ({_SAMPLE_FORMAT: _SIGNED} if kind.kind == "i" else {})
    buffer = io.BytesIO()
    images[0].save(
        buffer, "TIFF", save_all=True, append_images=images[1:], compression="tiff_adobe_deflate", tiffinfo=tags
    )
    return buffer.getvalue()


def decode_bands(data: bytes, name: str, channels: Channels, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The chosen bands of a TIFF, each mapped from its range of values to 0 … 255.

    A stored value v of a band becomes (v - low) / (high - low) · 255, rounded to the nearest number (of two, the even
    one), and 0 or 255 outside the range.

    Args:
        data: the bytes of the file.
        name: shard and key, for the message.
        channels: which bands, in this order.
        max_pixels: larger images are refused before anything is decoded.

    Returns:
        uint8 (C, H, W), in memory that may be written to.

    Raises:
        BadSample: ``not_an_image``: no TIFF, too few pages, pages of other kinds or sizes, corrupt; ``too_large``.
        UserError: its bands are interleaved, and rasterio is not installed.
    """
    expected = f"its index names bands, so a TIFF with page {max(channels.pages) + 1} of 8 or 16 bits is needed"
    if not data.startswith(TIFF_STARTS):
        raise bad("not_an_image", name, f"no TIFF; {expected}")
    try:
        with quiet():
            image = TiffImagePlugin.TiffImageFile(io.BytesIO(data))
            interleaved = image.tag_v2.get(_SAMPLES, 1) > 1
            if not interleaved:
                return _decoded_pages(image, name, channels, max_pixels, expected)
    except BadSample:
        raise
    except SyntaxError:  # Pillow has no mode for it
        interleaved = True
    except Exception as error:  # decoders may raise any exception for damaged bytes
        raise bad("not_an_image", name, f"not a readable TIFF ({said(error)}); replace it") from None
    with open_raster(data, name) as raster:
        return _decoded_raster(raster, name, channels, max_pixels, expected)


def _decoded_pages(
    image: TiffImagePlugin.TiffImageFile, name: str, channels: Channels, max_pixels: int, expected: str
) -> NDArray[np.uint8]:
    planes: NDArray[np.uint8] | None = None
    for number, (band, page) in enumerate(zip(channels.bands, channels.pages, strict=True)):
        try:
            image.seek(page)
        except EOFError:
            raise bad(
                "not_an_image", name, f"its TIFF has no page {page + 1}, band {band.name!r}; {expected}"
            ) from None
        where = f"page {page + 1}, band {band.name!r}"
        check_size(image.height, image.width, name, max_pixels)
        tile = image.tag_v2.get(_TILE_WIDTH, 0) * image.tag_v2.get(_TILE_HEIGHT, 0)
        if tile > max(max_pixels, MAX_PIXELS):
            raise bad("not_an_image", name, f"{where}: tiles of {tile} px; save it anew")
        values = _page(image, name, where)
        if planes is None:
            planes = np.empty((len(channels.bands), *values.shape), np.uint8)
        if values.shape != planes.shape[1:]:
            (height, width), (own_height, own_width) = planes.shape[1:], values.shape
            what = f"{where}: {own_height} × {own_width} px, where the page before has {height} × {width}"
            raise bad("not_an_image", name, f"{what}; resample all bands to one size")
        _map_into(planes[number], values, band.low, band.high)
    assert planes is not None
    return planes


def _page(image: TiffImagePlugin.TiffImageFile, name: str, where: str) -> NDArray[Any]:
    """The values (H, W) of the page that an image is at."""
    bits = image.tag_v2.get(_BITS, (1,))
    signed = image.mode == "I" and bits == (16,)
    if not signed and not (image.mode == "L" and bits == (8,)) and not image.mode.startswith("I;16"):
        what = f"{where}: mode {image.mode} of {'/'.join(map(str, bits))} bits"
        raise bad("not_an_image", name, f"{what}; pages are grey, of 8 or 16 bits")
    values = np.asarray(image)
    if signed:
        return values.astype(np.int16)
    return values if image.mode == "L" else values.astype(np.uint16, copy=False)


def _decoded_raster(raster: Raster, name: str, channels: Channels, max_pixels: int, expected: str) -> NDArray[np.uint8]:
    check_size(*raster.size_px, name, max_pixels)
    if raster.count <= max(channels.pages):
        raise bad("not_an_image", name, f"its TIFF has {raster.count} bands in one page; {expected}")
    return mapped(raster.read(channels.pages), channels.bands)


def mapped(stored: NDArray[Any], bands: Sequence[Band]) -> NDArray[np.uint8]:
    """Measured values, each band's range to 0 … 255, as :func:`decode_bands` says.

    Args:
        stored: uint8, uint16 or int16 (C, H, W).
        bands: by channel.

    Returns:
        uint8 (C, H, W).
    """
    planes = np.empty(stored.shape, np.uint8)
    for plane, values, band in zip(planes, stored, bands, strict=True):
        _map_into(plane, values, band.low, band.high)
    return planes


def fill_without_data(pages: NDArray[Any], valid: NDArray[np.bool_] | None, bands: Sequence[Band]) -> NDArray[Any]:
    """Measured values that are the low end of each range where there are no data, so that they are read as 0.

    Of a range that begins below what the values can be, they are the smallest value, and read as what that becomes.

    Args:
        pages: uint8, uint16 or int16 (C, H, W); changed in place.
        valid: bool (H, W), False where there are no data; None: all have.
        bands: by page.

    Returns:
        ``pages``.
    """
    if valid is not None:
        limits = np.iinfo(pages.dtype)
        for page, band in zip(pages, bands, strict=True):
            page[~valid] = min(max(floor(band.low), limits.min), limits.max)
    return pages


def _map_into(plane: NDArray[np.uint8], values: NDArray[Any], low: float, high: float) -> None:
    """Map the values (H, W) of a band into ``plane``."""
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        plane[:] = values
        return
    table = _table(low, high, values.dtype == np.int16)
    unsigned = values if values.dtype == np.uint8 else values.view(np.uint16)
    rows = max(1, _MANY_PX // max(1, values.shape[1]))
    for top in range(0, len(values), rows):
        np.take(table, unsigned[top : top + rows], out=plane[top : top + rows], mode="clip")


@lru_cache(maxsize=256)
def _table(low: float, high: float, signed: bool) -> NDArray[np.uint8]:
    """uint8 (65536,): what each stored value becomes, by its 16 bits as an unsigned number."""
    values = np.arange(1 << 16, dtype=np.uint16)
    numbers = (values.view(np.int16) if signed else values).astype(np.float64)
    table: NDArray[np.uint8] = np.rint(((numbers - low) / (high - low) * 255).clip(0, 255)).astype(np.uint8)
    table.flags.writeable = False
    return table
