"""Files that are stored turned: as they are stored, and upright."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.image import decode_large
from maskmatch_scale.data.images.label import decode_raw_values
from maskmatch_scale.data.images.orientation import orientation_of, upright
from maskmatch_scale.data.writing.sources.store_image import store_image

RAMP = np.add.outer(np.arange(16) * 4, np.arange(24) * 6).astype(np.uint8)
PIXELS = np.stack([RAMP, RAMP.max() - RAMP, np.full_like(RAMP, 90)], axis=-1)


def turned(kind, orientation, pixels=PIXELS):
    """Bytes of a file of 24 × 16 px with an orientation."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    Image.fromarray(pixels).save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def opened(data):
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(kind, orientation):
    data = turned(kind, orientation)
    assert orientation_of(data) == orientation
    made = upright(data, "x")
    assert (made == data) == (orientation == 1)
    assert orientation_of(made) == 1
    expected = np.asarray(ImageOps.exif_transpose(opened(turned("PNG", orientation))))
    difference = np.abs(np.asarray(opened(made).convert("RGB")).astype(int) - expected)
    assert difference.max() <= (12 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_as_they_are_stored(orientation):
    """The writer of shards agrees with `maskmatch predict`, and label maps with their images."""
    data = turned("TIFF", orientation)
    stored = store_image(data, "x", labelled=True)
    assert (stored.size, stored.original) == ((24, 16), (24, 16))
    assert np.array_equal(np.asarray(opened(stored.data)), PIXELS)
    assert orientation_of(stored.data) == 1
    planes = decode_large(data, "x", exif_orientation=True)
    assert np.array_equal(planes.transpose(1, 2, 0), PIXELS)
    label = (RAMP % 5).astype(np.uint8)
    assert np.array_equal(decode_raw_values(turned("TIFF", orientation, label), "x"), label)
    assert np.array_equal(decode_raw_values(turned("TIFF", orientation, PIXELS), "x"), PIXELS)


def test_shrunk_tiffs_too():
    stored = store_image(turned("TIFF", 6), "x", labelled=False, max_side=12)
    assert stored.size == (12, 8)


def test_files_without_an_orientation():
    assert [orientation_of(data) for data in (b"", b"\xff\xd8\xffExif\0", b"II*\0", turned("PNG", 1)[:40])] == [1] * 4
    assert upright(b"nonsense", "x") == b"nonsense"
    damaged = turned("JPEG", 6)
    with pytest.raises(BadSample, match="x: not a readable image"):
        upright(damaged[:-60], "x")
