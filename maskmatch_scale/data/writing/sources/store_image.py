"""Images as they are stored: unchanged if training can read them, otherwise as lossless WebP, or shrunk as JPEG."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.encode import encode_image
from maskmatch_scale.data.images.image import MODES, eight_bits, jpeg_size, orientation_alone
from maskmatch_scale.data.images.opening import MAX_PIXELS, file_faults, open_any
from maskmatch_scale.data.images.orientation import UPRIGHT, as_stored, orientation_of
from maskmatch_scale.data.writing.sources.plain_tiff import refuse_lost_bands

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Files taken for images, in lower case."""

_JPEG_QUALITY = 95
_MAX_WEBP_PX = 16383
_SMALLER = "--tile cuts it into tiles, --max-side shrinks it"
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "PNG": "png"}
_WEBP = {"lossless": True, "method": 1, "quality": 20}  # of 2 MP in 0.3 s; slower settings save 1 %


class Stored(NamedTuple):
    """An image as it is stored."""

    data: bytes
    extension: str
    size: tuple[int, int]
    """Width and height, px."""
    original: tuple[int, int]
    """Width and height in the file that was read, px."""


def store_image(data: bytes, name: str, *, labelled: bool, max_side: int | None = None) -> Stored:
    """Decode an image, to be sure that it can be decoded, and encode it again where it cannot stay as it is.

    JPEG and WebP stay as they are, PNG too if there is no label (beside one, `.png` is the label map). Others become
    lossless WebP: 16 bits are cut to the upper 8 and alpha is dropped, as in training. A TIFF of more bands is refused.
    An image larger than `max_side` is shrunk and becomes a JPEG of quality 95. An orientation in EXIF data stays there;
    pixels are not turned, nor are those of a TIFF with a tag `Orientation`, as in `maskmatch predict`.

    Args:
        data: the bytes of the file.
        name: of the file, for the message.
        labelled: whether there is a label map.
        max_side: longest side, px; None: any.

    Raises:
        BadSample: `empty`, `not_an_image` or `too_large`.
    """
    if not data:
        raise BadSample("empty", f"{name}: a file of no bytes")
    with file_faults(name, "not_an_image", "image"):
        size = jpeg_size(data)
        if size is not None and (max_side is None or max(size) <= max_side):
            height, width = size
            refuse_huge((width, height), name)
            return Stored(data, "jpg", (width, height), (width, height))
        refuse_lost_bands(data, name)
        try:
            with open_any(data) as image:
                image.load()
                turned = orientation_of(data) if image.format == "TIFF" else UPRIGHT
                return _store(image, data, name, labelled, max_side, turned)
        except Image.DecompressionBombError as error:
            raise BadSample("too_large", f"{name}: {error}; --tile cuts it into tiles") from None


def _store(image: Image.Image, data: bytes, name: str, labelled: bool, max_side: int | None, turned: int) -> Stored:
    """Encode an image that Pillow has read, and turned as `turned` says."""
    if image.mode not in MODES:
        raise BadSample("not_an_image", f"{name}: mode {image.mode}; convert it to 8 bits a channel")
    exif = orientation_alone(image)
    image_format, image = image.format, as_stored(eight_bits(image, data, name), turned)
    size = image.size
    if max_side is not None and max(size) > max_side:
        small = shrunk(size, max_side)
        image = image.convert("L" if image.mode == "L" else "RGB").resize(small, Image.Resampling.LANCZOS)
        return Stored(encode_image(image, "JPEG", quality=_JPEG_QUALITY, exif=exif), "jpg", small, size)
    refuse_huge(size, name)
    if image_format in _KEPT and not (image_format == "PNG" and labelled):
        return Stored(data, _KEPT[image_format], size, size)
    if max(size) > _MAX_WEBP_PX:
        what = f"{size[0]} × {size[1]} px are more than WebP holds ({_MAX_WEBP_PX} a side); {_SMALLER}"
        raise BadSample("too_large", f"{name}: {what}")
    return Stored(encode_image(image.convert("RGB"), "WEBP", exif=exif, **_WEBP), "webp", size, size)


def encode_tile(pixels: NDArray[np.uint8], *, is_jpeg: bool, exif: Image.Exif | None = None) -> tuple[bytes, str]:
    """A part of an image as it is stored: lossless, or of a JPEG as a JPEG of quality 95.

    Args:
        pixels: uint8 (h, w, 3).
        is_jpeg: whether the image was a JPEG, so that lossless tiles would be many times as large, and no better.
        exif: with its orientation; None: it has none.

    Returns:
        The bytes, and their extension.
    """
    image, exif = Image.fromarray(np.ascontiguousarray(pixels)), exif or Image.Exif()
    if is_jpeg:
        return encode_image(image, "JPEG", quality=_JPEG_QUALITY, exif=exif), "jpg"
    return encode_image(image, "WEBP", exif=exif, **_WEBP), "webp"


def refuse_huge(size: tuple[int, int], name: str) -> None:
    """Raise for a width and height of more pixels than training reads by default."""
    if size[0] * size[1] > MAX_PIXELS:
        what = f"{size[0]} × {size[1]} px, more than {MAX_PIXELS} pixels; {_SMALLER}"
        raise BadSample("too_large", f"{name}: {what}")


def shrunk(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """Width and height when the longer one becomes `max_side`."""
    longer = max(size)
    return tuple(max(1, round(side * max_side / longer)) for side in size)  # type: ignore[return-value]
