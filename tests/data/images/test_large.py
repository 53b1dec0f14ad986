"""Large images: converted in bands of rows, from files, in any format; the same pixels as at once."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images import image as decoding
from maskmatch_scale.data.images.image import decode_large, decode_planes
from tests.data.bad_shards import png_header
from tests.data.images.test_decode import FORMATS, PICTURE, PIXELS, with_exif


@pytest.mark.parametrize("name", FORMATS)
def test_bands_and_files_give_the_pixels_of_the_whole(tmp_path, monkeypatch, name):
    path = tmp_path / "x"
    path.write_bytes(FORMATS[name])
    whole = decode_planes(FORMATS[name], "x")
    monkeypatch.setattr(decoding, "_BAND_PIXELS", 67 * 7)
    assert np.array_equal(decode_planes(FORMATS[name], "x"), whole)
    assert np.array_equal(decode_planes(path, "x"), whole)
    assert np.array_equal(decode_large(path, "x", exif_orientation=False), whole)


def test_a_large_image_is_not_held_more_than_twice(monkeypatch):
    """In bands nothing of the size of the image is made beside Pillow's image and the planes."""
    sizes = []
    crop = Image.Image.crop
    monkeypatch.setattr(decoding, "_BAND_PIXELS", 67 * 7)
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: sizes.append(box[3] - box[1]) or crop(self, box))
    decode_planes(FORMATS["png rgb"], "x")
    assert sizes == [7, 7, 7, 7, 7, 7, 3]


@pytest.mark.parametrize("format_name", ["BMP", "TIFF", "GIF"])
def test_other_formats_are_decoded_only_where_they_may_be(tmp_path, format_name):
    path = tmp_path / "x"
    PICTURE.save(path, format_name)
    with Image.open(path) as opened:
        expected = np.array(opened.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode_large(path, "x", exif_orientation=True), expected)
    with pytest.raises(BadSample, match="neither JPEG nor PNG nor WebP"):
        decode_large(path, "x", exif_orientation=True, any_format=False)


def test_numbers_that_are_no_colours_are_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(buffer, "TIFF")
    with pytest.raises(BadSample, match="mode F; convert it to 8 bits"):
        decode_large(buffer.getvalue(), "x", exif_orientation=False)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG"])
def test_orientation_is_followed_if_asked_for(tmp_path, format_name):
    path = tmp_path / "x"
    PICTURE.save(path, format_name, exif=with_exif(6))
    as_stored = decode_large(path, "x", exif_orientation=False)
    assert as_stored.shape[1:] == PIXELS.shape[:2]
    turned = decode_large(path, "x", exif_orientation=True)
    assert np.array_equal(turned, np.rot90(as_stored, -1, (1, 2)))


def test_more_pixels_than_fit_are_refused_by_their_header():
    with pytest.raises(BadSample, match=r"more than 500000000 pixels.*write it as a TIFF"):
        decode_large(png_header(30_000, 30_000), "x", exif_orientation=False)
