"""Encoding images and label maps with Pillow."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def encode_image(image: Image.Image, format_name: str, **options: object) -> bytes:
    """An image as a file of one of Pillow's formats, such as `JPEG`; `options` are those of `Image.save`."""
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def encode_label(values: NDArray[np.uint8], **options: object) -> bytes:
    """An 8-bit grey PNG of uint8 (H, W); `options` are those of Pillow for PNG."""
    return encode_image(Image.fromarray(values), "PNG", **options)
