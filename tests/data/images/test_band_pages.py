"""TIFFs of bands: the formula, what is read of them, and what others' files must not do."""

import io
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.band_pages import decode_bands, encode_pages
from maskmatch_scale.data.images.bands import Band, Channels, choose_channels, shown_channels, shown_names
from maskmatch_scale.data.images.decode import decode_image
from maskmatch_scale.data.images.encode import encode_image

RANDOM = np.random.default_rng(0)
BANDS = tuple(Band(name, 0, 4095) for name in ("red", "green", "blue", "nir", "swir"))
PAGES = RANDOM.integers(0, 5000, (5, 37, 53), dtype=np.uint16)
STORED = encode_pages(list(PAGES))


def channels(*names, ranges=None):
    return choose_channels(BANDS, names or None, ranges)


def by_formula(values, low, high):
    return np.rint(((values.astype(np.float64) - low) / (high - low) * 255).clip(0, 255))


def fault(data, chosen=None, **options):
    with pytest.raises(BadSample) as caught:
        decode_image(data, "s.tar: sample 'a'", channels=chosen or channels(), **options)
    assert str(caught.value).startswith("s.tar: sample 'a': ")
    return caught.value.reason, str(caught.value)


@given(
    st.sampled_from(["uint8", "uint16", "int16"]),
    st.floats(-70_000, 70_000),
    st.floats(1e-3, 140_000),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_values_are_mapped_as_the_formula_says(kind, low, width, seed):
    limits = np.iinfo(kind)
    values = np.random.default_rng(seed).integers(limits.min, limits.max, (9, 11), dtype=kind, endpoint=True)
    band = Band("a", low, low + width)
    found = decode_bands(encode_pages([values]), "x", Channels((band,), (0,)))
    assert found.dtype == np.uint8
    assert np.array_equal(found[0], by_formula(values, band.low, band.high))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16"])
def test_other_programs_read_the_values_that_were_measured(kind):
    limits = np.iinfo(kind)
    pages = RANDOM.integers(limits.min, limits.max, (3, 20, 31), dtype=kind, endpoint=True)
    data = encode_pages(list(pages))
    assert data == encode_pages(list(pages))
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
        for number, page in enumerate(pages):
            image.seek(number)
            assert np.array_equal(np.asarray(image), page)
    rasterio = pytest.importorskip("rasterio")
    with rasterio.MemoryFile(data) as file:
        for number, page in enumerate(pages, start=1):
            with rasterio.open(f"GTIFF_DIR:{number}:{file.name}") as dataset:
                assert dataset.dtypes == (kind,)
                assert np.array_equal(dataset.read(1), page)


def test_bands_are_chosen_by_name_in_the_order_of_the_channels():
    image = decode_image(STORED, "x", channels=channels("nir", "red", ranges={"red": (100, 200)}))
    assert image.shape == (2, 37, 53)
    assert np.array_equal(image[0], by_formula(PAGES[3], 0, 4095))
    assert np.array_equal(image[1], by_formula(PAGES[0], 100, 200))
    image += 1  # the memory may be written to


@pytest.mark.parametrize("stored", [BANDS, ()])
@pytest.mark.parametrize(
    ("names", "ranges", "said"),
    [
        ((), {}, "data.channels: none is named; the bands are red, green, blue.*, and null takes all"),
        (("red", "green", "red"), {}, "data.channels: 'red' is there twice"),
        (None, {"red": (40, 3)}, r"data.value_ranges: red: \[40, 3\] is no range; the lower end comes first"),
        (None, {"red": (0, float("inf"))}, r"data.value_ranges: red: \[0, inf\] is no range"),
    ],
)
def test_channels_that_cannot_be_are_refused_by_their_key(stored, names, ranges, said):
    with pytest.raises(ValueError, match=said):
        choose_channels(stored, names, ranges)


def test_8_bits_stay_as_they_are():
    pages = RANDOM.integers(0, 255, (2, 5, 6), dtype=np.uint8, endpoint=True)
    plain = Channels((Band("a", 0, 255), Band("b", 0, 255)), (0, 1))
    assert np.array_equal(decode_bands(encode_pages(list(pages)), "x", plain), pages)


def test_pages_that_are_not_wanted_are_not_decoded():
    with Image.open(io.BytesIO(STORED)) as image:
        image.seek(2)
        at = image.tag_v2[273][0]
    damaged = bytearray(STORED)
    damaged[at : at + 200] = b"\xff" * 200
    assert decode_image(bytes(damaged), "x", channels=channels("red", "green", "nir", "swir")).shape[0] == 4
    assert fault(bytes(damaged))[0] == "not_an_image"


def test_what_is_not_as_the_index_says():
    picture = Image.fromarray(RANDOM.integers(0, 255, (8, 9, 3), dtype=np.uint8))
    assert "no TIFF; its index names bands, so a TIFF with page 5" in fault(encode_image(picture, "JPEG"))[1]
    assert "no page 4, band 'nir'" in fault(encode_pages(list(PAGES[:3])))[1]
    other = encode_image(
        Image.fromarray(PAGES[0]), "TIFF", save_all=True, append_images=[Image.fromarray(PAGES[0, :20, :20])]
    )
    assert "page 2, band 'green': 20 × 20 px, where the page before has 37 × 53" in fault(other)[1]
    floats = encode_image(Image.fromarray(PAGES[0].astype(np.float32)), "TIFF")
    assert "mode F of 32 bits; pages are grey, of 8 or 16 bits" in fault(floats, channels("red"))[1]
    assert fault(STORED, max_pixels=37 * 53 - 1)[0] == "too_large"
    with pytest.raises(BadSample, match="but a TIFF, and its index names no bands: `maskmatch shards index --bands`"):
        decode_image(STORED, "x")


def test_interleaved_bands_of_other_writers_are_read():
    rasterio = pytest.importorskip("rasterio")
    for interleave in ("pixel", "band"):
        with rasterio.MemoryFile() as file:
            size = {"width": 53, "height": 37, "count": 5, "dtype": "uint16"}
            with file.open(driver="GTiff", interleave=interleave, compress="lzw", **size) as dataset:
                dataset.write(PAGES)
            data = file.read()
        chosen = channels("swir", "green")
        assert decode_image(data, "x", channels=chosen).equal(decode_image(STORED, "x", channels=chosen))
        assert fault(data, max_pixels=1000)[0] == "too_large"
        assert fault(data[:-500])[0] == "not_an_image"
        more = Channels((Band("a", 0, 1),), (5,))
        assert "its TIFF has 5 bands in one page" in fault(data, more)[1]


def hostile(pages, **tags):
    """An uncompressed TIFF of pages of one pixel, or of what ``tags`` say, without pixels."""
    numbers = {"width": 256, "height": 257, "tile_width": 322, "tile_height": 323}
    entries = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: 1}
    entries |= {numbers[name]: value for name, value in tags.items()}
    size, parts = 2 + 12 * len(entries) + 4, [b"II*\0" + struct.pack("<I", 8)]
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    for page in range(pages):
        following = 8 + size * (page + 1) if page < pages - 1 else 0
        parts.append(struct.pack("<H", len(entries)) + packed + struct.pack("<I", following))
    return b"".join(parts)


def test_hostile_files_are_not_walked_through(monkeypatch):
    read, load = [], TiffImagePlugin.ImageFileDirectory_v2.load
    monkeypatch.setattr(
        TiffImagePlugin.ImageFileDirectory_v2, "load", lambda self, file: (read.append(1), load(self, file))
    )
    decode_image(hostile(50_000), "x", channels=channels("green"))
    assert len(read) <= 8
    assert fault(hostile(1, width=60_000, height=60_000))[0] == "too_large"
    assert "tiles of" in fault(hostile(5, tile_width=1 << 20, tile_height=1 << 20))[1]
    loop = bytearray(hostile(2))
    loop[-4:] = struct.pack("<I", 8)
    assert "no page 3" in fault(bytes(loop))[1]


def test_damaged_files_are_bad_samples():
    draw = random.Random(0)
    reasons = []
    for _ in range(150):
        damaged = bytearray(STORED)
        for _ in range(draw.choice((1, 3, 20))):
            damaged[draw.randrange(2 * len(damaged) // 3, len(damaged))] = draw.randrange(256)
        try:
            decode_image(bytes(damaged[: draw.choice((len(damaged), 500))]), "x", channels=channels())
        except BadSample as bad:
            reasons.append(bad.reason)
    assert len(reasons) > 50
    assert set(reasons) <= {"not_an_image", "too_large"}


def test_what_is_shown_of_bands():
    assert shown_names([]) == ("red", "green", "blue")
    assert shown_names(["nir", "blue", "green", "red"]) == ("red", "green", "blue")
    assert shown_names(["a", "b", "c", "d"]) == ("a", "b", "c")
    assert shown_names(["vv", "vh"]) == ("vv", "vv", "vv")
    assert shown_channels(()) is None
    shown = shown_channels(BANDS)
    assert shown is not None
    assert shown.pages == (0, 1, 2)
