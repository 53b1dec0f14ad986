"""Bytes of a shard member to a uint8 tensor. The bytes may come from anybody; nothing is ever unpickled.

Formats are told by content, whatever the member's extension: JPEG is read by libjpeg-turbo, PNG and WebP by Pillow's
classes for the two, TIFFs of bands by Pillow's class for TIFF, or by rasterio. No other decoder of Pillow is used.
``max_pixels`` is checked against the header before anything is decoded. Pillow's own
limit of size, 179 million pixels, holds for WebP only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskmatch_scale.data.images.band_pages import decode_bands
from maskmatch_scale.data.images.bands import Channels
from maskmatch_scale.data.images.image import decode_planes
from maskmatch_scale.data.images.label import decode_values
from maskmatch_scale.data.images.opening import MAX_PIXELS


def decode_image(
    data: bytes,
    name: str,
    *,
    channels: Channels | None = None,
    max_pixels: int = MAX_PIXELS,
    exif_orientation: bool = False,
    contiguous: bool = True,
) -> Tensor:
    """An image of a shard: a JPEG, PNG or WebP to RGB, or chosen bands of a TIFF.

    In RGB grey is repeated, a palette looked up, 16 bits cut to the upper 8, alpha dropped.

    Args:
        data: the encoded image.
        name: shard and key, for the message.
        channels: the bands to take of a TIFF, and their ranges of values; None: a plain image, as RGB.
        max_pixels: more are refused before anything is decoded.
        exif_orientation: turn the image as its EXIF data says. Only for plain images without a label map, see
            :func:`decode_label`.
        contiguous: whether the pixels, which decoders interleave, are copied to one plane a channel. The copy takes a
            quarter of the time of a JPEG (512 px, one thread: 0.96 ms with it, 0.73 ms without). A caller that cuts a
            piece out next does not need it.

    Returns:
        uint8 (C, H, W), a channel of ``channels`` each; (3, H, W) without. JPEG pixels are those of libjpeg-turbo's
        accurate settings, the same as Pillow's.

    Raises:
        BadSample: ``not_an_image``: another format, corrupt or cut short (what is there is not used), 12-bit data in 16
            bits, whose upper 8 are black, or a TIFF without the bands; ``too_large``.
    """
    if channels is not None:
        return torch.from_numpy(decode_bands(data, name, channels, max_pixels=max_pixels))
    planes = decode_planes(data, name, max_pixels=max_pixels, exif_orientation=exif_orientation, contiguous=contiguous)
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
        ignore_index: value of ignored pixels.
        size: (H, W) of the image in px, which the label map must have; None allows any.
        max_pixels: more are refused before anything is decoded.

    Returns:
        uint8 (H, W).

    Raises:
        BadSample: ``not_a_label``: no PNG, corrupt, or of several channels; ``too_large``, ``label_size``,
            ``label_value``.
    """
    values = decode_values(
        data, name, num_classes=num_classes, ignore_index=ignore_index, size=size, max_pixels=max_pixels
    )
    return torch.from_numpy(values)
