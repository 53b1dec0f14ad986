"""Which pixels of a file have data: masks, transparency and values without data, and bands that only look like it."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from maskmatch_scale.data.images.band_pages import decode_bands
from maskmatch_scale.data.images.bands import Band, choose_channels
from maskmatch_scale.data.images.file_bands import FileBands
from maskmatch_scale.data.images.raster import open_raster
from maskmatch_scale.data.images.tiff import open_tiff
from maskmatch_scale.data.writing.sources.store_bands import BandRule, store_bands

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

NAMES = ("red", "green", "blue", "nir")
SIZE = (40, 50)
GDAL_NODATA = 42113


def values(dtype="uint8", seed=0):
    return np.random.default_rng(seed).integers(0, 256, (4, *SIZE)).astype(dtype)


def tiff(path, bands, mask=None, **options):
    size = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype}
    with (
        warnings.catch_warnings(action="ignore"),
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", **size, **options) as file,
    ):
        file.write(bands)
        if mask is not None:
            file.write_mask(mask)
    return path


def valid(path, bands):
    with open_raster(path, "x") as raster:
        return raster.valid(bands)


def test_near_infrared_that_gdal_calls_transparency_hides_nothing(tmp_path):
    path = tiff(tmp_path / "a.tif", values())
    with rasterio.open(path) as file:
        assert file.colorinterp[3].name == "alpha"
    assert valid(path, [0, 1, 2]) is None
    assert valid(path, [0, 1, 2, 3]) is None
    with open_tiff(path, "x") as image:
        assert image.valid(slice(0, 10)) is None
        assert "[4] are not used" in image.unused


def test_transparency_with_soft_edges_says_where_there_are_data(tmp_path):
    bands = values()
    bands[3] = 255
    bands[3, :7] = 0
    bands[3, 7, :20] = np.arange(20) * 10 + 10  # 1 % of the pixels
    path = tiff(tmp_path / "a.tif", bands)
    expected = bands[3] > 0
    np.testing.assert_array_equal(valid(path, [0, 1, 2]), expected)
    assert valid(path, [0, 3]) is None
    with open_tiff(path, "x") as image:
        np.testing.assert_array_equal(image.valid(slice(0, 40)), expected)
        assert image.unused is None


def test_a_mask_counts_beside_a_band_that_gdal_calls_transparency(tmp_path):
    mask = np.full(SIZE, 255, np.uint8)
    mask[:7, :7] = 0
    path = tiff(tmp_path / "a.tif", values(), mask)
    for bands in ([0, 1, 2], [0, 1, 2, 3]):
        np.testing.assert_array_equal(valid(path, bands), mask > 0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_a_pixel_without_data_has_none_in_any_band_of_the_file_whichever_are_wanted(tmp_path, dtype):
    bands = values(dtype)
    bands[:, :5, :5] = 17
    bands[3, :5, 3:5] = 3  # so these have data
    path = tiff(tmp_path / "a.tif", bands, nodata=17)
    expected = (bands != 17).any(axis=0)
    assert 15 <= np.count_nonzero(~expected) < 25
    for wanted in ([0, 1, 2], [3], [0, 1, 2, 3]):
        np.testing.assert_array_equal(valid(path, wanted), expected)


def test_a_value_without_data_holds_for_all_pages(tmp_path):
    bands = values("uint16")
    bands[0, :5, :5] = bands[:, 20:24, 20:24] = 7
    pages = [Image.frombytes("I;16", SIZE[::-1], page.tobytes()) for page in bands]
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[GDAL_NODATA] = "7"
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:], tiffinfo=tags)
    expected = (bands != 7).any(axis=0)
    assert expected[:5, :5].all()
    assert not expected[20:24, 20:24].any()
    np.testing.assert_array_equal(valid(buffer.getvalue(), [0, 1]), expected)


@pytest.mark.parametrize("low_high", [(0, 255), (20.5, 3000.25), (-100.5, 3000.25)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
@pytest.mark.parametrize("wanted", [NAMES, ("nir", "red"), ("red", "green", "blue")])
def test_files_are_read_as_their_shards(tmp_path, low_high, dtype, wanted):
    bands = values(dtype)
    bands[:, :5, :5] = 17
    path = tiff(tmp_path / "a.tif", bands, nodata=17)
    named = tuple(Band(name, *low_high) for name in NAMES)
    stored, _ = store_bands(path.read_bytes(), "x", BandRule(NAMES, named, frozenset()))
    channels = choose_channels(named, wanted)
    expected = decode_bands(stored.data, "x", channels)
    files = FileBands(channels.bands, tuple(name if name in wanted else "-" for name in NAMES))
    np.testing.assert_array_equal(files.read(path, "x"), expected)
    with open_tiff(path, "x", files) as image:
        np.testing.assert_array_equal(image.planes(slice(0, 40), slice(0, 50)), expected)
