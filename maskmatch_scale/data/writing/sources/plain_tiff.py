"""TIFFs that are written as plain RGB or grey images: refused if that would drop bands or pages."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.opening import TIFF_STARTS, start_of
from maskmatch_scale.data.images.raster import open_raster
from maskmatch_scale.errors import UserError

_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA, _FORMAT = 258, 262, 277, 338, 339
"""Numbers of TIFF tags."""
_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}
"""By photometric interpretation: how many samples are colours, where it is not one (RGB, CMYK, YCbCr, CIELab)."""
_TRANSPARENCY = (1, 2)
"""Values of `ExtraSamples`."""
_REDUCED_OR_MASK = 1 | 4
"""Bits of `NewSubfileType`: a smaller copy of another page, or a mask of it."""
_SUBFILE = 254
_KINDS = {1: "uint", 2: "int", 3: "float"}
_MOST_PAGES = 100
_SIDE_PX = 1024
"""Of a larger image that is not read whole, so many rows and columns are looked at, evenly spread."""


def refuse_lost_bands(data: bytes | Path, name: str) -> None:
    """Raise :class:`BadSample` for a TIFF that has more bands than RGB or grey with transparency, or several pages.

    A fourth band that is declared as transparency but has more than two values is probably another one: GDAL calls near
    infrared in an 8-bit TIFF so. Any other file passes, also a damaged one, which decoding will find.

    Args:
        data: the file: its bytes, or its path if it is too large for them; then a part of its pixels is looked at.
        name: of it, for the message.
    """
    if not start_of(data).startswith(TIFF_STARTS):
        return
    first = _tags(data)
    if first is None:
        return
    samples, extra = first.get(_SAMPLES, 1), first.get(_EXTRA, ())
    colours = _COLOURS.get(first.get(_PHOTOMETRIC, 1), 1)
    kind = f"{_KINDS.get(first.get(_FORMAT, (1,))[0], 'values of ')}{first.get(_BITS, (1,))[0]}"
    if samples > colours and not (samples == colours + 1 and extra[:1] and extra[0] in _TRANSPARENCY):
        raise _named(name, f"a TIFF of {samples} bands of {kind}", samples)
    if kind == "int16" or (samples > 1 and kind != "uint8"):
        raise _named(name, f"a TIFF of {samples} band{'s' * (samples > 1)} of {kind}", samples)
    if samples > colours and (count := _kinds_of_last(data)) > 2:
        what = f"a TIFF whose band {samples} is declared as transparency but has {count} different values"
        raise _named(name, what, samples)
    if (pages := _pages_alike(data)) > 1:
        raise _named(name, f"a TIFF of {pages} pages", pages)


def _named(name: str, what: str, count: int) -> BadSample:
    if "float" in what or "int32" in what:
        remedy = "scale them to 16 bits, all files alike (gdal_translate -ot UInt16 -scale LOW HIGH 0 65535 IN OUT)"
        return BadSample("not_an_image", f"{name}: {what}; {remedy}, and name its bands with --bands")
    example = {1: "grey", 2: "vv,vh", 3: "red,green,blue", 4: "red,green,blue,nir"}.get(count, "red,green,blue,…")
    more = " or, without the fourth, red,green,blue,-" if count == 4 else ""
    return BadSample("not_an_image", f"{name}: {what}; name each: --bands {example}{more}")


def _opened(data: bytes | Path) -> BinaryIO:
    return io.BytesIO(data) if isinstance(data, bytes) else data.open("rb")


def _tags(data: bytes | Path) -> Any:
    """The tags of the first page; None if they cannot be read."""
    try:
        with _opened(data) as file:
            header = file.read(16)
            is_big = header.startswith(TIFF_STARTS[2:])
            directory = TiffImagePlugin.ImageFileDirectory_v2(header if is_big else header[:8])
            file.seek(directory.next)
            directory.load(file)
            return dict(directory)
    except Exception:  # of damaged bytes any
        return None


def _kinds_of_last(data: bytes | Path) -> int:
    """How many different values the last band has."""
    try:
        if isinstance(data, Path):
            with open_raster(data, str(data)) as raster:
                height, width = raster.size_px
                return len(np.unique(raster.read([raster.count - 1], (min(height, _SIDE_PX), min(width, _SIDE_PX)))))
        with Image.open(io.BytesIO(data)) as image:
            return len(np.unique(np.asarray(image.getchannel(len(image.getbands()) - 1))))
    except UserError:
        raise
    except Exception:  # decoding will find what is wrong
        return 0


def _pages_alike(data: bytes | Path) -> int:
    """How many pages are images of the size of the first, and neither smaller copies nor masks; at most about 100."""
    try:
        with _opened(data) as file:
            image = TiffImagePlugin.TiffImageFile(file)
            size, count, number = image.size, 1, 1
            while number < _MOST_PAGES:
                try:
                    image.seek(number)
                except EOFError:
                    break
                count += image.size == size and not image.tag_v2.get(_SUBFILE, 0) & _REDUCED_OR_MASK
                number += 1
            return count
    except Exception:
        return 1
