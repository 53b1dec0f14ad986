"""Bytes of a shard member to a uint8 tensor. The bytes may come from anybody; nothing is ever unpickled.

Formats are told by content, whatever the member's extension: JPEG by libjpeg-turbo, PNG and WebP by Pillow's classes
for the two. No other decoder of Pillow is reachable, and neither is its own limit on size: ``max_pixels`` alone counts,
and is checked against the header before anything is decoded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from torch import Tensor

from maskmatch_scale.data.faults import BadSample

MAX_PIXELS = 100_000_000
"""Default upper limit of pixels an image or label map."""

_SCANS = 20
_SCANNED_PIXELS = 500_000_000
"""A JPEG of more scans may have this many pixels times scans. Progressive ones have about ten scans; thousands of empty
ones in a small file would take minutes to decode."""
_JPEG, _PNG, _RIFF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"
_START_OF_SCAN = b"\xff\xda"
_ORIENTATION = 0x0112
_IGNORED_16_BIT = 0xFFFF
_PNG_BIT_DEPTH = 24
"""Byte of a PNG that holds its bits a channel."""
_UNSCALE = {2: 85, 4: 17}
"""Pillow spreads grey of so many bits over 0–255 by multiplying with this."""


def decode_image(
    data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, exif_orientation: bool = False, contiguous: bool = True
) -> Tensor:
    """JPEG, PNG or WebP to RGB. Grey is repeated, a palette looked up, 16 bits cut to the upper 8, alpha dropped.

    Args:
        data: the encoded image.
        name: shard and key, for the message.
        max_pixels: more are refused before anything is decoded.
        exif_orientation: turn the image as its EXIF data says. Only for images without a label map, see
            :func:`decode_label`.
        contiguous: copy the pixels, which decoders interleave, to one plane a channel. That is a fifth of the time of a
            JPEG (512 px, one thread: 0.96 ms, 0.73 without); wasted on those who cut a piece out next.

    Returns:
        uint8 (3, H, W). JPEG pixels are those of libjpeg-turbo's accurate settings, the same as Pillow's.

    Raises:
        BadSample: ``not_an_image``: another format, corrupt or cut short (what is there is not used); ``too_large``.
    """
    try:
        pixels, orientation = _pixels(data, name, max_pixels, exif_orientation)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:  # WebP's class alone has Pillow's limit, 179 million pixels
        raise _bad("too_large", name, f"{_said(error)}; shrink it") from None
    except Exception as error:  # a decoder that is fed with anything may raise anything
        raise _bad("not_an_image", name, f"not a readable image ({_said(error)}); replace it") from None
    planes = _turned(pixels, orientation).transpose(2, 0, 1)
    # Torch reads no backward strides. NumPy's copy takes half the time of torch's on one thread.
    if contiguous or orientation != 1:
        planes = np.ascontiguousarray(planes)
    return torch.from_numpy(planes)


def decode_label(
    data: bytes,
    name: str,
    *,
    num_classes: int | None = None,
    ignore_index: int = 255,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """A single-channel PNG, grey (1, 2, 4, 8 or 16 bits) or palette, of class values.

    The values are those stored, whatever palette or bit depth. In 16 bits 65535 is ``ignore_index``, and nothing else
    above 255 is allowed. A label map is never turned: EXIF data of its image must be ignored too.

    Args:
        data: the encoded label map.
        name: shard and key, for the message.
        num_classes: values from here on are refused, except ``ignore_index``; None allows all.
        ignore_index: value of pixels that count for nothing.
        size: (H, W) of the image in px, which the label map must have; None allows any.
        max_pixels: more are refused before anything is decoded.

    Returns:
        uint8 (H, W).

    Raises:
        BadSample: ``not_a_label``: no PNG, corrupt, or of several channels; ``too_large``, ``label_size``,
            ``label_value``.
    """
    try:
        with _quiet():
            values = _label_values(data, name, size, max_pixels)
    except BadSample:
        raise
    except Exception as error:
        raise _bad("not_a_label", name, f"not a readable label map ({_said(error)}); replace it") from None
    if values.dtype == np.uint16:
        wrong = values[(values > 255) & (values != _IGNORED_16_BIT)]
        if len(wrong):
            raise _bad("label_value", name, f"label value {wrong.max()}; classes go up to 255, ignored is 65535")
        values = np.where(values == _IGNORED_16_BIT, np.uint16(ignore_index), values).astype(np.uint8)
    if num_classes is not None:
        wrong = values[(values >= num_classes) & (values != ignore_index)]
        if len(wrong):
            raise _bad(
                "label_value",
                name,
                f"label value {wrong.max()}, but there are {num_classes} classes, and {ignore_index} "
                "for what is ignored; map the labels when writing the shards, or raise the number of classes",
            )
    return torch.from_numpy(values)


def _pixels(data: bytes, name: str, max_pixels: int, exif_orientation: bool) -> tuple[NDArray[np.uint8], int]:
    """HWC pixels and EXIF orientation, 1 to 8."""
    if data.startswith(_JPEG) and (turbo := _turbojpeg(data, name, max_pixels)) is not None:
        return turbo, _orientation(data) if exif_orientation and b"Exif\0" in data else 1
    with _quiet():
        image = _opened(data)
        _check_size(image.height, image.width, name, max_pixels)
        if data.startswith(_JPEG):
            _check_scans(data, image.height, image.width, name)
        image.load()
        if image.mode.startswith("I;16"):
            pixels = (np.asarray(image) >> 8).astype(np.uint8)[..., None].repeat(3, axis=2)
        else:
            pixels = np.array(image.convert("RGB"))  # a copy: torch wants memory that may be written to
    return pixels, _orientation(data) if exif_orientation else 1


def _turbojpeg(data: bytes, name: str, max_pixels: int) -> NDArray[np.uint8] | None:
    """HWC pixels, or None for a JPEG that Pillow has to read."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width, name, max_pixels)
        _check_scans(data, height, width, name)
        if colours in ("CMYK", "YCCK"):
            return None  # Pillow's conversion is exact
        if colours == "Gray":
            grey: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="GRAY")
            return np.concatenate([grey.reshape(1, height, width)] * 3).transpose(1, 2, 0)
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return pixels
    except BadSample:
        raise
    except ValueError as error:
        if any(sign in str(error) for sign in ("Corrupt JPEG data", "Premature end")):
            raise
        return None  # harmless oddities, rare subsampling


def _opened(data: bytes) -> Image.Image:
    """Pillow's image, its header read and its pixels not. The classes themselves: Image.open has limits of its own."""
    file = io.BytesIO(data)
    if data.startswith(_PNG):
        return PngImagePlugin.PngImageFile(file)
    if data.startswith(_RIFF) and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(file)
    if data.startswith(_JPEG):
        return JpegImagePlugin.JpegImageFile(file)
    raise ValueError("neither JPEG nor PNG nor WebP")


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of odd metadata and palettes; nobody who trains can act on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_size(height: int, width: int, name: str, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise _bad("too_large", name, f"{height} × {width} px, more than data.max_image_px={max_pixels}; shrink it")


def _check_scans(data: bytes, height: int, width: int, name: str) -> None:
    scans = data.count(_START_OF_SCAN)
    if scans > _SCANS and scans * height * width > _SCANNED_PIXELS:
        raise _bad("not_an_image", name, f"a JPEG of {scans} scans, which takes too long to decode; save it anew")


def _orientation(data: bytes) -> int:
    try:
        with _quiet():
            value = _opened(data).getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata says nothing of the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """HWC pixels upright; a view. EXIF 2.3, tag 0x0112: 1 upright, 2 mirrored, 3 upside down …, 5 to 8 lie."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _label_values(
    data: bytes, name: str, size: tuple[int, int] | None, max_pixels: int
) -> NDArray[np.unsignedinteger[Any]]:
    """(H, W), uint8 or uint16."""
    if not data.startswith(_PNG):
        raise ValueError("no PNG")
    image = _opened(data)
    if size is not None and (image.height, image.width) != size:
        raise _bad(
            "label_size",
            name,
            f"the image is {size[0]} × {size[1]} px (height × width), its label map "
            f"{image.height} × {image.width}; write both in one size",
        )
    _check_size(image.height, image.width, name, max_pixels)
    if image.mode not in ("1", "L", "P", "I;16"):
        raise _bad("not_a_label", name, f"label map has mode {image.mode}; write a PNG of one channel, grey or palette")
    values = np.array(image)
    if image.mode == "I;16":
        return values.astype(np.uint16)
    values = values.astype(np.uint8)
    if image.mode == "L":
        values //= _UNSCALE.get(data[_PNG_BIT_DEPTH], 1)
    return values


def _bad(reason: str, name: str, what: str) -> BadSample:
    # A name from a tar may hold line ends and escape sequences, which must reach no terminal.
    shown = name if name.isprintable() else repr(name)[1:-1]
    return BadSample(reason, f"{shown}: {what}")


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
