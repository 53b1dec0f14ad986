"""Images as they are stored: byte for byte if training can read them, otherwise without loss."""

from __future__ import annotations

import io
from typing import NamedTuple

import simplejpeg
from PIL import Image

from maskmatch_scale.data.faults import BadSample

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Files taken for images, in lower case."""

_JPEG_QUALITY = 95
_MAX_WEBP_PX = 16383
_WEBP = {"lossless": True, "method": 1, "quality": 20}  # of 2 MP in 0.3 s; slower settings save 1 %
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "La", "RGBa")
"""Of eight bits a channel."""


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
    lossless WebP. What is larger than `max_side` is shrunk and becomes JPEG of quality 95.

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
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            if max_side is None or max(width, height) <= max_side:
                # The decoder of training, which is strict; grey is enough to go through every byte.
                simplejpeg.decode_jpeg(data, colorspace="GRAY")
                return Stored(data, "jpg", (width, height), (width, height))
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _store(image, data, name, labelled, max_side)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too_large", f"{name}: {error}; cut it into tiles") from None
    except Exception as error:
        # Pillow's decoders raise nearly anything for damaged files.
        raise BadSample("not_an_image", f"{name}: not a readable image ({error})") from None


def _store(image: Image.Image, data: bytes, name: str, labelled: bool, max_side: int | None) -> Stored:
    size = image.size
    if image.mode not in _MODES:
        raise BadSample("not_an_image", f"{name}: mode {image.mode}; convert it to 8 bits a channel")
    if max_side is not None and max(size) > max_side:
        small = shrunk(size, max_side)
        image = image.convert("L" if image.mode == "L" else "RGB").resize(small, Image.Resampling.LANCZOS)
        return Stored(_encoded(image, "JPEG", quality=_JPEG_QUALITY), "jpg", small, size)
    if image.format == "WEBP" or (image.format == "PNG" and not labelled):
        return Stored(data, image.format.lower(), size, size)
    if max(size) > _MAX_WEBP_PX:
        what = f"{size[0]} × {size[1]} px are more than WebP holds ({_MAX_WEBP_PX} a side); --max-side shrinks it"
        raise BadSample("too_large", f"{name}: {what}")
    return Stored(_encoded(image.convert("RGB"), "WEBP", **_WEBP), "webp", size, size)


def shrunk(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """Width and height when the longer one becomes `max_side`."""
    longer = max(size)
    return tuple(max(1, round(side * max_side / longer)) for side in size)  # type: ignore[return-value]


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
