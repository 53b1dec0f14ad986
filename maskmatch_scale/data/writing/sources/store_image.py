"""Images as they are stored: byte for byte if training can read them, otherwise without loss."""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from maskmatch_scale.data.faults import BadSample

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Files taken for images, in lower case."""

MAX_PIXELS = 100_000_000
"""Larger images are refused, as training does by default (`data/images/decode.py`, which would load torch)."""

_JPEG_QUALITY = 95
_ORIENTATION = 0x0112
_DAMAGE = ("Corrupt JPEG data", "Premature end")
"""Complaints of libjpeg that mean lost pixels; others are harmless."""
_MAX_WEBP_PX = 16383
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "PNG": "png"}
_WEBP = {"lossless": True, "method": 1, "quality": 20}  # of 2 MP in 0.3 s; slower settings save 1 %
_16_BIT = ("I;16", "I;16B", "I;16L")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "La", "RGBa", *_16_BIT)


class Stored(NamedTuple):
    """An image as it is stored."""

    data: bytes
    extension: str
    size: tuple[int, int]
    """Width and height, px."""
    original: tuple[int, int]
    """What they were in the file."""


def store_image(data: bytes, name: str, *, labelled: bool, max_side: int | None = None) -> Stored:
    """Decode an image, to be sure that it can be, and encode it anew where it cannot stay.

    JPEG and WebP stay as they are, PNG too if there is no label (beside one, `.png` is the label map). Others become
    lossless WebP: 16 bits cut to the upper 8, alpha dropped, as in training. What is larger than `max_side` is shrunk
    and becomes JPEG of quality 95. An orientation in EXIF data stays in it; pixels are not turned.

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
    try:
        if simplejpeg.is_jpeg(data):
            size = _checked_jpeg(data)
            if size is not None and (max_side is None or max(size) <= max_side):
                _refuse_huge(size, name)
                return Stored(data, "jpg", size, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _store(image, data, name, labelled, max_side)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too_large", f"{name}: {error}; cut it into tiles") from None
    except UnidentifiedImageError:  # whose text holds an address
        raise BadSample("not_an_image", f"{name}: no image of a format that is known here") from None
    except Exception as error:
        # Pillow's decoders raise nearly anything for damaged files.
        raise BadSample("not_an_image", f"{name}: not a readable image ({error})") from None


def _store(image: Image.Image, data: bytes, name: str, labelled: bool, max_side: int | None) -> Stored:
    size = image.size
    if image.mode not in _MODES:
        raise BadSample("not_an_image", f"{name}: mode {image.mode}; convert it to 8 bits a channel")
    exif = Image.Exif()
    if turned := image.getexif().get(_ORIENTATION):
        exif[_ORIENTATION] = turned
    if max_side is not None and max(size) > max_side:
        small = shrunk(size, max_side)
        image = _eight_bits(image, "L" if image.mode == "L" else "RGB").resize(small, Image.Resampling.LANCZOS)
        return Stored(_encoded(image, "JPEG", quality=_JPEG_QUALITY, exif=exif), "jpg", small, size)
    _refuse_huge(size, name)
    if image.format in _KEPT and not (image.format == "PNG" and labelled):
        return Stored(data, _KEPT[image.format], size, size)
    if max(size) > _MAX_WEBP_PX:
        what = f"{size[0]} × {size[1]} px are more than WebP holds ({_MAX_WEBP_PX} a side); --max-side shrinks it"
        raise BadSample("too_large", f"{name}: {what}")
    return Stored(_encoded(_eight_bits(image, "RGB"), "WEBP", exif=exif, **_WEBP), "webp", size, size)


def _checked_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that was decoded to its end; None if Pillow has to try."""
    try:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        # Grey is enough to go through every byte.
        simplejpeg.decode_jpeg(data, colorspace="GRAY")
    except ValueError as error:
        if any(sign in str(error) for sign in _DAMAGE):
            raise
        return None
    return width, height


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in _16_BIT:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert(mode)


def _refuse_huge(size: tuple[int, int], name: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        what = f"{size[0]} × {size[1]} px, more than {MAX_PIXELS} pixels; --max-side shrinks it"
        raise BadSample("too_large", f"{name}: {what}")


def shrunk(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """Width and height when the longer one becomes `max_side`."""
    longer = max(size)
    return tuple(max(1, round(side * max_side / longer)) for side in size)  # type: ignore[return-value]


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
