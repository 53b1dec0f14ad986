"""Bytes of a shard member to a uint8 tensor. Nothing is ever unpickled."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from maskmatch_scale.data.faults import DataError


def decode_image(data: bytes, name: str) -> Tensor:
    """JPEG (libjpeg-turbo), PNG or WebP (Pillow) to RGB.

    Args:
        data: the encoded image.
        name: shard and key, for the message.

    Returns:
        uint8 (3, H, W), contiguous.

    Raises:
        DataError: the bytes are not an image.
    """
    try:
        if simplejpeg.is_jpeg(data):
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
        else:
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.asarray(image.convert("RGB"))
    except (ValueError, OSError, UnidentifiedImageError) as error:
        raise DataError(f"{name}: not a readable image ({error})") from None
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def decode_label(data: bytes, name: str) -> Tensor:
    """A single-channel PNG (grey or palette) of class values.

    Returns:
        uint8 (H, W).

    Raises:
        DataError: not a PNG, or one with several channels.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ("L", "P"):
                raise DataError(f"{name}: label map has mode {image.mode}; an 8-bit grey or palette PNG is needed")
            values = np.array(image)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{name}: not a readable label map ({error})") from None
    return torch.from_numpy(values)
