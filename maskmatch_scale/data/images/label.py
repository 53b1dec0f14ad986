"""Decoding label maps to NumPy arrays: those in shards, and those of data sets that are written as shards."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.opening import (
    BIT_DEPTH,
    MAX_PIXELS,
    MOST_WHOLE_PIXELS,
    PNG,
    bad,
    check_size,
    file_faults,
    open_any,
    open_stored,
    quiet,
    said,
)
from maskmatch_scale.data.images.orientation import UPRIGHT, as_stored, orientation_of

_IGNORED_16_BIT = 0xFFFF
_COLOUR_TYPE = 25
"""The byte of a PNG that holds its kind of colour (0 is grey)."""
_UNSCALE = {2: 85, 4: 17}
"""By bits of a grey PNG: Pillow multiplies its values by this, to spread them over 0–255."""
_MODES = ("1", "L", "P", "I;16")
"""Pillow's modes of one channel."""
_FORMATS = ("PNG", "TIFF", "BMP", "GIF")
"""Formats that label maps of data sets may have; all of them are lossless."""


def decode_values(
    data: bytes,
    name: str,
    *,
    num_classes: int | None = None,
    ignore_index: int = 255,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """The class values of a label map in a shard: see :func:`maskmatch_scale.data.images.decode.decode_label`.

    Returns:
        uint8 (H, W), in memory that may be written to.

    Raises:
        BadSample: ``not_a_label``, ``too_large``, ``label_size`` or ``label_value``.
    """
    try:
        with quiet():
            values = _stored_values(data, name, size, max_pixels)
    except BadSample:
        raise
    except Exception as error:
        raise bad("not_a_label", name, f"not a readable label map ({said(error)}); replace it") from None
    if values.dtype == np.uint16:
        wrong = values[(values > 255) & (values != _IGNORED_16_BIT)]
        if len(wrong):
            raise bad("label_value", name, f"label value {wrong.max()}; classes go up to 255, ignored is 65535")
        values = np.where(values == _IGNORED_16_BIT, np.uint16(ignore_index), values).astype(np.uint8)
    if num_classes is not None:
        wrong = values[(values >= num_classes) & (values != ignore_index)]
        if len(wrong):
            raise bad(
                "label_value",
                name,
                f"label value {wrong.max()}, but there are {num_classes} classes, and {ignore_index} "
                "for what is ignored; map the labels when writing the shards, or raise the number of classes",
            )
    return values


def decode_raw_values(data: bytes, name: str) -> NDArray[Any]:
    """Decode a label map of a data set: the numbers of a grey or palette image, the colours of an RGB image.

    A TIFF is not turned, whatever its tag `Orientation` says, as its image is not.

    Args:
        data: the bytes of a PNG, TIFF, BMP or GIF.
        name: of the file, for the message.

    Returns:
        uint8 or, of 16 bits, uint16 (H, W); uint8 (H, W, 3) of an RGB image.

    Raises:
        BadSample: ``not_a_label``: another format, corrupt, or of other channels; ``too_large``.
    """
    with file_faults(name, "not_a_label", "label map"), _open_raw(data) as image:
        if image.height * image.width > MOST_WHOLE_PIXELS:
            what = f"{image.height} × {image.width} px, more than {MOST_WHOLE_PIXELS} pixels; write it as a TIFF"
            raise BadSample("too_large", f"{name}: {what}")
        if image.format not in _FORMATS:
            raise BadSample(
                "not_a_label", f"{name}: a label map of format {image.format}, not one of {', '.join(_FORMATS)}"
            )
        orientation = orientation_of(data) if image.format == "TIFF" else UPRIGHT
        if image.mode in ("RGB", "RGBA"):
            return np.asarray(as_stored(image.convert("RGB"), orientation))
        if image.mode not in (*_MODES, "I;16B"):
            what = f"label map of mode {image.mode}; grey (8 or 16 bits), palette or RGB is needed"
            raise BadSample("not_a_label", f"{name}: {what}")
        if orientation != UPRIGHT:
            image.load()
            return _values(as_stored(image, orientation), data)
        return _values(image, data)


def _open_raw(data: bytes) -> Image.Image:
    """A PNG without Pillow's own limit of size, which would be less than that of the image that it belongs to."""
    return open_stored(data) if data.startswith(PNG) else open_any(data)


def is_8_bit_grey_png(data: bytes) -> bool:
    """Whether the bytes are a grey PNG of 8 bits, the format in which label maps are written to shards."""
    return data.startswith(PNG) and data[BIT_DEPTH : _COLOUR_TYPE + 1] == b"\x08\x00"


def _stored_values(
    data: bytes, name: str, size: tuple[int, int] | None, max_pixels: int
) -> NDArray[np.unsignedinteger[Any]]:
    """(H, W), uint8 or uint16."""
    if not data.startswith(PNG):
        raise ValueError("no PNG")
    image = open_stored(data)
    if size is not None and (image.height, image.width) != size:
        raise bad(
            "label_size",
            name,
            f"the image is {size[0]} × {size[1]} px (height × width), its label map "
            f"{image.height} × {image.width}; write both in one size",
        )
    check_size(image.height, image.width, name, max_pixels)
    if image.mode not in _MODES:
        raise bad("not_a_label", name, f"label map has mode {image.mode}; write a PNG of one channel, grey or palette")
    return _values(image, data)


def _values(image: Image.Image, data: bytes) -> NDArray[np.unsignedinteger[Any]]:
    """The numbers that the file of a one-channel image holds: (H, W), uint16 if it has 16 bits, otherwise uint8."""
    values = np.array(image)
    if image.mode.startswith("I;16"):
        return values.astype(np.uint16)
    values = values.astype(np.uint8)
    if image.mode == "L" and image.format == "PNG":
        values //= _UNSCALE.get(data[BIT_DEPTH], 1)
    return values
