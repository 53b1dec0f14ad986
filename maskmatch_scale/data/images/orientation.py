"""EXIF orientation of files that are written as shards: what it is, and files whose pixels are turned upright.

Pillow turns a TIFF by its tag `Orientation` when it reads the pixels, and no other format.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from maskmatch_scale.data.images.encode import encode_image
from maskmatch_scale.data.images.opening import file_faults, open_any, quiet

UPRIGHT = 1
ON_THEIR_SIDE = range(5, 9)
"""Orientations of files whose width is the height of what they show."""
_ORIENTATION = 0x0112
"""Number of the EXIF tag, and of that of a TIFF."""
_TURNED_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""By orientation: what makes an image that was turned upright what is stored in its file."""
_JPEG_QUALITY = 95


def orientation_of(data: bytes | Path) -> int:
    """The EXIF orientation of an image file, 1 (upright) to 8; 1 where it says none or cannot be read."""
    if isinstance(data, bytes) and not (b"Exif\0" in data or data.startswith((b"II", b"MM", b"\x89PNG", b"RIFF"))):
        return UPRIGHT
    try:
        with quiet():
            value = open_any(data).getexif().get(_ORIENTATION, UPRIGHT)
    except Exception:  # the pixels may be good where the metadata are broken
        return UPRIGHT
    return value if isinstance(value, int) and 1 <= value <= 8 else UPRIGHT


def as_stored(image: Image.Image, orientation: int) -> Image.Image:
    """The pixels of a TIFF as they are in its file, which Pillow has turned.

    Args:
        image: whose pixels were read.
        orientation: of the file.
    """
    method = _TURNED_BACK.get(orientation)
    return image if method is None else image.transpose(method)


def upright(data: bytes, name: str) -> bytes:
    """A file with the pixels of another one turned upright, and no orientation.

    Args:
        data: the bytes of a file.
        name: of it, for the message.

    Returns:
        The same bytes where nothing is to be turned; otherwise a JPEG of quality 95 of a JPEG, and a PNG, without loss,
        of other formats.

    Raises:
        BadSample: ``not_an_image``.
    """
    if orientation_of(data) == UPRIGHT:
        return data
    with file_faults(name, "not_an_image", "image"):
        image = open_any(data)
        kind = "JPEG" if image.format in ("JPEG", "MPO") else "PNG"
        image.load()
        turned = image if image.format == "TIFF" else ImageOps.exif_transpose(image)
        turned.info.pop("exif", None)
        if kind == "JPEG":
            return encode_image(turned, kind, quality=_JPEG_QUALITY)
        return encode_image(turned, kind)
