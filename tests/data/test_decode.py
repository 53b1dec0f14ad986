import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from maskmatch_scale.data.decode import decode_image, decode_label
from maskmatch_scale.data.faults import DataError


def encoded(pixels, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_images_come_back_as_they_were(kind):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    image = decode_image(encoded(pixels, kind, lossless=True), "x")
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0), pixels)


def test_jpeg_grey_or_colour_is_rgb():
    grey = np.full((16, 16, 1), 90, np.uint8)
    image = decode_image(simplejpeg.encode_jpeg(grey, colorspace="GRAY"), "x")
    assert image.shape == (3, 16, 16)
    assert (image.float() - 90).abs().max() <= 2


def test_grey_and_palette_labels_hold_class_values():
    values = np.random.default_rng(0).integers(0, 9, (6, 4), dtype=np.uint8)
    palette = Image.fromarray(values)
    palette.putpalette([channel for value in range(256) for channel in (255 - value, 0, 0)])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    for data in (encoded(values, "PNG"), buffer.getvalue()):
        assert np.array_equal(decode_label(data, "x"), values)


@pytest.mark.parametrize("decode", [decode_image, decode_label])
@pytest.mark.parametrize("data", [b"", b"nonsense", b"\xff\xd8\xff broken jpeg", b"\x89PNG\r\n\x1a\n"])
def test_rubbish_names_the_sample(decode, data):
    with pytest.raises(DataError, match="shard-1: key"):
        decode(data, "shard-1: key")


def test_a_colour_label_map_is_refused():
    with pytest.raises(DataError, match="RGB"):
        decode_label(encoded(np.zeros((4, 4, 3), np.uint8), "PNG"), "x")
