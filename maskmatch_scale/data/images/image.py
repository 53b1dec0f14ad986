"""Decoding images to NumPy arrays, and the rules about images that readers and writers of shards share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.opening import (
    BIT_DEPTH,
    JPEG,
    MAX_PIXELS,
    MOST_WHOLE_PIXELS,
    PNG,
    bad,
    check_size,
    is_stored,
    open_any,
    open_stored,
    quiet,
    said,
    start_of,
)

T = TypeVar("T")

_SCANS = 20
_SCANNED_PIXELS = 500_000_000
"""In a JPEG of more than `_SCANS` scans, pixels times scans may be at most this. Progressive JPEGs have about ten;
thousands of empty scans in a small file would take minutes to decode."""
_START_OF_SCAN = b"\xff\xda"
_PIECE = 1 << 22
"""Bytes that are looked through at once."""
_LOST_PIXELS = ("Corrupt JPEG data", "Premature end")
"""Complaints of libjpeg-turbo that mean lost pixels; others are harmless."""
TWELVE_BITS = 1 << 12
"""From here on a value of 16 bits is not of 12-bit data."""
_ORIENTATION = 0x0112
"""Number of the EXIF tag."""
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
"""Numbers of TIFF tags."""
_WHITE_IS_ZERO = 0
"""A value of the latter."""
_TURNED_BACK = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
"""The orientation by which an image that was turned as another one says becomes what it was."""
_BAND_PIXELS = 1 << 22
"""Larger images are converted in bands of rows, because Pillow's conversions and NumPy's copies are whole images."""
MODES = (
    *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "La", "RGBa"),
    *("I;16", "I;16B", "I;16L"),
)
"""Pillow's modes that are converted to RGB without loss of more than alpha and of the lower 8 of 16 bits."""


def decode_planes(
    data: bytes | Path,
    name: str,
    *,
    max_pixels: int = MAX_PIXELS,
    exif_orientation: bool = False,
    contiguous: bool = True,
    any_format: bool = False,
) -> NDArray[np.uint8]:
    """The RGB planes of a JPEG, PNG or WebP: see :func:`maskmatch_scale.data.images.decode.decode_image`.

    In memory are at most the pixels as Pillow holds them (4 bytes a pixel of RGB) and the planes (3 bytes), and of a
    JPEG, or where ``data`` are bytes, the file.

    Args:
        data: the file: its bytes or its path.
        name: of it, for the message.
        max_pixels: more are refused.
        exif_orientation: whether to turn it as its EXIF data says.
        contiguous: whether the pixels are copied to one plane a channel.
        any_format: whether other formats of Pillow are decoded too, as writers of shards do.

    Returns:
        uint8 (3, H, W), in memory that may be written to.

    Raises:
        BadSample: ``not_an_image`` or ``too_large``.
    """
    try:
        if isinstance(data, Path) and start_of(data).startswith(JPEG):
            data = data.read_bytes()
        pixels, orientation = _pixels(data, name, max_pixels, exif_orientation, any_format)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:  # Pillow's limit, 179 million pixels; not of JPEG's and PNG's class
        raise bad("too_large", name, f"{said(error)}; shrink it") from None
    except Exception as error:  # decoders may raise any exception for damaged bytes
        raise bad("not_an_image", name, f"not a readable image ({said(error)}); replace it") from None
    planes = _turned(pixels, orientation).transpose(2, 0, 1)
    # Torch takes no arrays with negative strides. NumPy's copy takes half the time of torch's on one thread.
    return np.ascontiguousarray(planes) if contiguous or orientation != 1 else planes


def decode_large(
    data: bytes | Path, name: str, *, exif_orientation: bool, any_format: bool = True
) -> NDArray[np.uint8]:
    """The RGB planes of an image that is predicted or cut into tiles: as training would see it, written whole.

    TIFFs are not turned, whatever their tag `Orientation` says: `maskmatch predict`, which reads them in parts, does
    not turn them either.

    Args:
        data: the file: its bytes or its path.
        name: of it, for the message.
        exif_orientation: whether to turn it as its EXIF data says; only JPEG, PNG and WebP.
        any_format: see :func:`decode_planes`.

    Returns:
        uint8 (3, H, W), channels interleaved in memory; at most 500 million pixels of a JPEG or PNG, and 179 million
        of other formats, which is Pillow's own limit.

    Raises:
        BadSample: ``not_an_image`` or ``too_large``.
    """
    try:
        return decode_planes(
            data,
            name,
            max_pixels=MOST_WHOLE_PIXELS,
            exif_orientation=exif_orientation,
            contiguous=False,
            any_format=any_format,
        )
    except BadSample as error:
        if error.reason != "too_large":
            raise
        most = f"more than {MOST_WHOLE_PIXELS} pixels, or, if it is neither JPEG nor PNG, than Pillow's 179 million"
        what = f"{most}; write it as a TIFF, which is read in parts"
        raise bad("too_large", name, what) from None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Decode a JPEG to its end by libjpeg-turbo, to be sure that it can be decoded.

    Returns:
        Height and width (px). None if Pillow has to try instead: the bytes do not begin and end as a JPEG does, or
        libjpeg-turbo does not decode its kind, or complains of something harmless.

    Raises:
        ValueError: pixels are lost.
    """
    if not simplejpeg.is_jpeg(data):
        return None

    def decode() -> tuple[int, int]:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        # Grey is enough to go through every byte.
        simplejpeg.decode_jpeg(data, colorspace="GRAY")
        return height, width

    return _by_turbojpeg(decode)


def eight_bits(image: Image.Image, data: bytes | Path, name: str) -> Image.Image:
    """A 16-bit grey image reduced to its upper 8 bits. Any other image as it is: Pillow has reduced colours to 8 bits.

    Cameras and scanners write 10 or 12 bits into 16 without scaling them. Their upper 8 bits are all but black, so such
    images are refused, not silently used.

    Args:
        image: whose pixels were read.
        data: the file that it was read from: its bytes or its path.
        name: of the file or sample, for the message.

    Raises:
        BadSample: ``not_an_image``: it has 16 bits a channel, but no value above 4095.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        refuse_dark(int(values.max(initial=0)), name)
        upper = (values >> 8).astype(np.uint8)
        # Pillow inverts 8 bits of a TIFF of this kind, but not 16.
        white_is_zero = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        return Image.fromarray(255 - upper if white_is_zero else upper)
    start = start_of(data)
    is_png = start.startswith(PNG)
    tiff_bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, ())
    if (is_png and start[BIT_DEPTH] == 16) or 16 in (tiff_bits if isinstance(tiff_bits, tuple) else (tiff_bits,)):
        largest = max((int(band.max(initial=0)) for _, band in _rgb_bands(image)), default=0)
        refuse_dark(256 * largest if largest or not is_png else _largest_lower_byte(data), name)
    return image


def refuse_dark(largest: int, name: str) -> None:
    """Raise :class:`BadSample` if ``largest``, the largest value of an image of 16 bits, has 12 bits."""
    if 0 < largest < TWELVE_BITS:
        raise bad(
            "not_an_image",
            name,
            "16 bits a channel, but no value above 4095 of 65535, so that its upper 8 bits would be all but black: "
            "12-bit data? scale its values to 0–65535, or write it with 8 bits a channel",
        )


def _largest_lower_byte(data: bytes | Path) -> int:
    """The largest lower byte of a PNG of 16 bits a channel whose upper bytes are all 0; of grey with alpha 0."""
    image: Any = open_stored(data)
    if any(tile.args not in ("RGB;16B", "RGBA;16B") for tile in image.tile):
        return 0
    # Pillow keeps the first byte of a pair for rawmode …B, and the second for …L.
    image.tile = [tile._replace(args=tile.args.replace("16B", "16L")) for tile in image.tile]
    return max((int(band.max(initial=0)) for _, band in _rgb_bands(image)), default=0)


def _rgb_bands(image: Image.Image) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The first row and the pixels (h, W, 3) of bands of an image that was read or can be."""
    image.load()
    rows = max(1, _BAND_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        band = image if rows >= image.height else image.crop((0, top, image.width, min(top + rows, image.height)))
        yield top, np.asarray(band.convert("RGB"))


def orientation_alone(image: Image.Image) -> Image.Exif:
    """EXIF data with nothing but the orientation of an image, if it has one."""
    exif = Image.Exif()
    if turned := image.getexif().get(_ORIENTATION):
        exif[_ORIENTATION] = turned
    return exif


def _pixels(
    data: bytes | Path, name: str, max_pixels: int, exif_orientation: bool, any_format: bool
) -> tuple[NDArray[np.uint8], int]:
    """Pixels (H, W, 3) and EXIF orientation, 1 to 8."""
    if isinstance(data, bytes) and data.startswith(JPEG) and (turbo := _turbojpeg(data, name, max_pixels)) is not None:
        return turbo, _orientation(data) if exif_orientation and b"Exif\0" in data else 1
    with quiet():
        stored = is_stored(start_of(data)) or not any_format
        image = open_stored(data) if stored else open_any(data)
        check_size(image.height, image.width, name, max_pixels)
        if isinstance(data, bytes) and data.startswith(JPEG):
            _check_scans(data, image.height, image.width, name)
        if not stored and image.mode not in MODES:
            raise bad("not_an_image", name, f"mode {image.mode}; convert it to 8 bits a channel")
        turned = getattr(image, "tag_v2", {}).get(_ORIENTATION, 1)  # of a TIFF; Pillow removes the tag
        image.load()
        orientation = _orientation(data) if exif_orientation and stored else _TURNED_BACK.get(turned, 1)
        image = eight_bits(image, data, name)
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for top, band in _rgb_bands(image):
            pixels[top : top + len(band)] = band
    return pixels, orientation


def _turbojpeg(data: bytes, name: str, max_pixels: int) -> NDArray[np.uint8] | None:
    """Pixels (H, W, 3), or None for a JPEG that Pillow has to read."""

    def decode() -> NDArray[np.uint8] | None:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        check_size(height, width, name, max_pixels)
        _check_scans(data, height, width, name)
        if colours in ("CMYK", "YCCK"):
            return None  # Pillow's conversion is exact
        if colours == "Gray":
            grey: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="GRAY")
            return np.concatenate([grey.reshape(1, height, width)] * 3).transpose(1, 2, 0)
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return pixels

    return _by_turbojpeg(decode)


def _by_turbojpeg(decode: Callable[[], T]) -> T | None:
    """What a call of libjpeg-turbo returns, or None for harmless oddities and rare subsampling: Pillow has to try.

    Raises:
        ValueError: pixels are lost.
    """
    try:
        return decode()
    except BadSample:
        raise
    except ValueError as error:
        if any(sign in str(error) for sign in _LOST_PIXELS):
            raise
        return None


def _count_scans(data: bytes) -> int:
    """How often `_START_OF_SCAN` is there: by NumPy in a sixth of the time that `bytes.count` takes (100 kB: 14 µs)."""
    first, second = _START_OF_SCAN
    values = np.frombuffer(data, np.uint8)
    firsts, seconds = values[:-1], values[1:]
    pieces = [slice(at, at + _PIECE) for at in range(0, len(firsts), _PIECE)]
    return sum(int(np.count_nonzero((firsts[at] == first) & (seconds[at] == second))) for at in pieces)


def _check_scans(data: bytes, height: int, width: int, name: str) -> None:
    scans = _count_scans(data)
    if scans > _SCANS and scans * height * width > _SCANNED_PIXELS:
        raise bad("not_an_image", name, f"a JPEG of {scans} scans, which takes too long to decode; save it anew")


def _orientation(data: bytes | Path) -> int:
    """EXIF orientation of a JPEG, PNG or WebP, 1 to 8; 1 if it has none."""
    try:
        with quiet():
            value = open_stored(data).getexif().get(_ORIENTATION, 1)
    except Exception:  # the pixels may be good where the metadata are broken
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) upright, as a view. EXIF 2.3, tag 0x0112: 1 is upright, 2 mirrored, 3 upside down, 4 both;
    5 to 8 are the same, lying on their side.
    """
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
