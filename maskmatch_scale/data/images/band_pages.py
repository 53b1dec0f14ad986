"""Decoding TIFFs of bands to NumPy arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.images.bands import Channels
from maskmatch_scale.data.images.opening import MAX_PIXELS


def decode_bands(data: bytes, name: str, channels: Channels, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The chosen bands of a TIFF, each mapped from its range of values to 0 … 255.

    Returns:
        uint8 (C, H, W).
    """
    raise NotImplementedError(name)
