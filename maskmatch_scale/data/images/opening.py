"""Opening image files with Pillow: which formats, how many pixels, and how faults are reported.

A file is given by its bytes, or by its path where it is so large that its bytes should not be in memory beside its
pixels. There are two ways to open. What lies in a shard may come from anybody, so `open_stored` uses only Pillow's
classes for the three formats of shards; these classes do not apply Pillow's own limit of size, except that for WebP. A
data set that is written as shards may hold any format, so `open_any` tries all of Pillow's classes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

from maskmatch_scale.data.faults import BadSample

MAX_PIXELS = 100_000_000
"""Default upper limit of pixels of an image or label map."""
MOST_WHOLE_PIXELS = 500_000_000
"""Upper limit of pixels of an image that is predicted and cannot be read in parts: 1.5 GB of RGB."""

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
"""How files of these formats begin."""
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How TIFFs and BigTIFFs begin."""
BIT_DEPTH = 24
"""The byte of a PNG that holds its bits a channel."""
_RIFF = b"RIFF"
_LONGEST_START = 64
"""Bytes of a file from which its format is told."""


def start_of(data: bytes | Path) -> bytes:
    """The first bytes of a file, at least as many as its format is told from.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(data, bytes):
        return data
    with data.open("rb") as file:
        return file.read(_LONGEST_START)


def is_stored(start: bytes) -> bool:
    """Whether a file that begins like this is a JPEG, PNG or WebP."""
    return start.startswith((JPEG, PNG)) or (start.startswith(_RIFF) and start[8:12] == b"WEBP")


def open_stored(data: bytes | Path) -> Image.Image:
    """Pillow's image of a JPEG, PNG or WebP, told by its content. Its header is read, its pixels are not.

    Raises:
        ValueError: another format. Pillow's classes raise nearly any exception for damaged files.
    """
    start = start_of(data)
    if start.startswith(TIFF_STARTS):
        raise ValueError(
            "neither JPEG nor PNG nor WebP but a TIFF, and its index names no bands: `maskmatch shards index --bands`"
        )
    if not is_stored(start):
        raise ValueError("neither JPEG nor PNG nor WebP")
    # The classes themselves: Image.open has limits of its own.
    kind: type[ImageFile.ImageFile] = WebPImagePlugin.WebPImageFile
    if start.startswith((JPEG, PNG)):
        kind = PngImagePlugin.PngImageFile if start.startswith(PNG) else JpegImagePlugin.JpegImageFile
    return kind(io.BytesIO(data) if isinstance(data, bytes) else str(data))


def open_any(data: bytes | Path) -> Image.Image:
    """Pillow's image of a file of any format that Pillow reads. Its header is read, its pixels are not.

    Raises:
        UnidentifiedImageError: no such format. Pillow's classes raise nearly any exception for damaged files.
        DecompressionBombError: more than 179 million pixels, which is Pillow's own limit.
    """
    return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)


@contextmanager
def file_faults(name: str, reason: str, what: str) -> Iterator[None]:
    """Turn any exception of the body into a :class:`BadSample`, and suppress Pillow's warnings.

    Args:
        name: of the file, for the message.
        reason: one of :data:`maskmatch_scale.data.faults.REASONS`.
        what: what the file should be, for the message.
    """
    try:
        with quiet():
            yield
    except BadSample:
        raise
    except UnidentifiedImageError:  # whose text holds an address
        raise BadSample(reason, f"{name}: no image of a format that is known here") from None
    except Exception as error:
        # Pillow's decoders raise nearly any exception for damaged files.
        raise BadSample(reason, f"{name}: not a readable {what} ({error})") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress Pillow's warnings of odd metadata and palettes. Users of this package cannot act on them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_size(height: int, width: int, name: str, max_pixels: int) -> None:
    """Raise :class:`BadSample` `too_large` for more than `max_pixels` pixels."""
    if height * width > max_pixels:
        raise bad("too_large", name, f"{height} × {width} px, more than data.max_image_px={max_pixels}; shrink it")


def bad(reason: str, name: str, what: str) -> BadSample:
    """A fault of a sample in a shard, on one line.

    Args:
        reason: one of :data:`maskmatch_scale.data.faults.REASONS`.
        name: shard and key. A name from a tar may hold line ends and escape sequences, which must reach no terminal.
        what: what is wrong.
    """
    shown = name if name.isprintable() else repr(name)[1:-1]
    return BadSample(reason, f"{shown}: {what}")


def said(error: Exception) -> str:
    """The text of an exception on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
