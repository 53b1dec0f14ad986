"""TIFFs: windows of the file are the pixels, and maps lie where their image lies."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.image import decode_large
from maskmatch_scale.data.images.tiff import open_tiff
from maskmatch_scale.export import load_export
from maskmatch_scale.predict import write_tiff as writing

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

WHERE = {"transform": rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 5_800_000), "crs": "EPSG:25833"}


def write(path, bands, **options):
    """A TIFF of bands (C, H, W)."""
    count, height, width = bands.shape
    with (
        warnings.catch_warnings(action="ignore"),
        rasterio.open(
            path, "w", driver="GTiff", count=count, height=height, width=width, dtype=bands.dtype, **options
        ) as file,
    ):
        file.write(bands)
        return path


def read(path):
    with open_tiff(path, path.name) as image:
        height, width = image.size_px
        return image.read(slice(0, height), slice(0, width)).numpy()


@pytest.mark.parametrize("data", ["path", "bytes"])
def test_parts_are_cut_from_the_whole(tmp_path, photo, data):
    pixels = photo(1, 300, 280).transpose(2, 0, 1)
    path = write(tmp_path / "x.tif", pixels, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    with open_tiff(path if data == "path" else path.read_bytes(), "x") as image:
        assert image.size_px == (300, 280)
        for rows, columns in ((slice(0, 300), slice(0, 280)), (slice(70, 141), slice(33, 280))):
            assert np.array_equal(image.read(rows, columns), pixels[:, rows, columns])
    assert np.array_equal(decode_large(path, "x", exif_orientation=False), pixels)


def saved(mode, image, path, **options):
    Image.fromarray(image).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda pixels, path: write(path, pixels[:1]),
        lambda pixels, path: write(path, np.concatenate([pixels, pixels[:1]])),
        lambda pixels, path: write(path, (pixels[:1].astype(np.uint16) << 8) + 7),
        lambda pixels, path: write(path, pixels[:1], photometric="MINISWHITE"),
        lambda pixels, path: write(path, pixels[:1] >> 4, photometric="MINISWHITE", nbits=4),
        lambda pixels, path: write(path, pixels[:1] >> 7, photometric="MINISWHITE", nbits=1),
        lambda pixels, path: write(path, (pixels[:1].astype(np.uint16) << 8) + 7, photometric="MINISWHITE"),
        lambda pixels, path: saved("RGB", pixels.transpose(1, 2, 0), path, tiffinfo={0x0112: 6}),
        lambda pixels, path: saved("RGB", pixels.transpose(1, 2, 0), path, tiffinfo={0x0112: 7}),
        lambda pixels, path: saved("P", pixels.transpose(1, 2, 0), path),
        lambda pixels, path: saved("1", pixels.transpose(1, 2, 0), path),
        lambda pixels, path: saved("L", pixels.transpose(1, 2, 0), path, compression="tiff_lzw"),
        lambda pixels, path: saved("RGB", pixels.transpose(1, 2, 0), path, compression="tiff_adobe_deflate"),
    ],
    ids=[
        "grey",
        "alpha",
        "16 bits",
        "white is 0",
        "white is 0, 4 bits",
        "white is 0, 1 bit",
        "white is 0, 16 bits",
        "on its side",
        "on its side, mirrored",
        "palette",
        "1 bit",
        "lzw",
        "deflate",
    ],
)
def test_the_pixels_are_those_of_the_packages_decoder(tmp_path, photo, make):
    path = make(photo(2).transpose(2, 0, 1), tmp_path / "x.tif")
    assert np.array_equal(read(path), decode_large(path, "x", exif_orientation=False))


def test_white_may_be_zero(tmp_path, photo):
    grey = photo(2).transpose(2, 0, 1)[:1]
    for stored in (grey, grey.astype(np.uint16) << 8):
        path = write(tmp_path / "x.tif", stored, photometric="MINISWHITE")
        with open_tiff(path, "x") as image:
            assert np.array_equal(image.read(slice(0, 96), slice(0, 128)).numpy()[:1], 255 - grey)
            assert np.array_equal(np.array(image.shrunk(96, 128)).transpose(2, 0, 1)[:1], 255 - grey)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_not_turned(tmp_path, photo, orientation):
    pixels = photo(2)
    path = saved("RGB", pixels, tmp_path / "x.tif", tiffinfo={0x0112: orientation})
    for exif_orientation in (False, True):
        assert np.array_equal(decode_large(path, "x", exif_orientation=exif_orientation), pixels.transpose(2, 0, 1))


def test_channels_by_their_names(tmp_path, photo):
    pixels = photo(2).transpose(2, 0, 1)
    names = rasterio.enums.ColorInterp
    path = write(tmp_path / "x.tif", np.stack([pixels[2], pixels[1], pixels[0], 255 - pixels[0]]))
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [names.blue, names.green, names.red, names.undefined]
    assert np.array_equal(read(path), pixels)


@pytest.mark.parametrize(
    ("bands", "said"),
    [
        (np.zeros((3, 40, 40), np.float32), "gdal_translate -ot Byte -scale"),
        (np.full((1, 40, 40), 900, np.uint16), "12-bit data"),
    ],
)
def test_other_numbers_are_refused(tmp_path, bands, said):
    with pytest.raises(BadSample, match=said):
        read(write(tmp_path / "x.tif", bands))


def test_pixels_without_data_are_no_reason_to_take_12_bits_for_16(tmp_path):
    values = np.full((1, 40, 40), 900, np.uint16)
    values[:, :5] = 65535
    with pytest.raises(BadSample, match="12-bit data"):
        read(write(tmp_path / "x.tif", values, nodata=65535))
    read(write(tmp_path / "x.tif", values))


def test_a_damaged_file_is_a_bad_sample(tmp_path, photo):
    path = write(tmp_path / "x.tif", photo(1, 300, 280).transpose(2, 0, 1), compress="deflate")
    (tmp_path / "cut.tif").write_bytes(path.read_bytes()[:30_000])
    (tmp_path / "no.tif").write_bytes(b"II*\0nothing")
    (tmp_path / "png.tif").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("cut.tif", "no.tif", "png.tif"):
        with pytest.raises(BadSample, match=f"{name}: not a readable TIFF"):
            read(tmp_path / name)


@pytest.mark.parametrize("rows", [1, 100, 256, 300, 1000])
def test_rows_are_written_as_they_come(tmp_path, rows):
    values = np.random.default_rng(0).integers(0, 3, (700, 300), np.uint8)
    with writing.write_tiff(tmp_path / "x.tif", values.shape, WHERE) as file:
        for top in range(0, 700, rows):
            file.add(values[top : top + rows])
    with rasterio.open(tmp_path / "x.tif") as file:
        assert np.array_equal(file.read(1), values)
        assert file.profile["tiled"]


def test_maps_lie_where_the_image_lies(export, tmp_path, photo, maskmatch):
    pixels = photo(1, 300, 280)
    path = write(tmp_path / "ortho.tif", pixels.transpose(2, 0, 1), **WHERE)
    arguments = ("predict", export, path, "--out", tmp_path / "out", "--polygons", "geojson")
    code, _, err = maskmatch(*arguments)
    assert code == 0, err
    expected = load_export(export).predict(pixels)
    with rasterio.open(tmp_path / "out" / "ids" / "ortho.tif") as ids:
        assert (ids.transform, ids.crs) == (WHERE["transform"], rasterio.CRS.from_string(WHERE["crs"]))
        assert np.array_equal(ids.read(1), expected.classes)
        assert ids.colormap(1)[1] == (255, 0, 0, 255)
        assert ids.nodata is None
        assert ids.compression.name == "deflate"
    with rasterio.open(tmp_path / "out" / "confidence" / "ortho.tif") as confidence:
        assert confidence.transform == WHERE["transform"]
        assert np.abs(confidence.read(1) / 255 - expected.confidence).max() < 0.5 / 255 + 1e-6
    content = json.loads((tmp_path / "out" / "geojson" / "ortho.geojson").read_text())
    assert content["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::25833"
    shapes = [(each["geometry"], each["properties"]["value"]) for each in content["features"]]
    filled = rasterio.features.rasterize(shapes, (300, 280), fill=99, transform=WHERE["transform"])
    assert np.array_equal(filled, expected.classes)
    with Image.open(tmp_path / "out" / "overlay" / "ortho.jpg") as overlay:
        assert overlay.height > 300
    before = (tmp_path / "out" / "ids" / "ortho.tif").stat().st_mtime_ns
    assert maskmatch(*arguments)[0] == 0
    assert (tmp_path / "out" / "ids" / "ortho.tif").stat().st_mtime_ns == before


def test_pixels_without_data_have_no_class(export, tmp_path, photo, maskmatch):
    pixels = photo(1, 200, 280)
    pixels[:, :90] = 0
    pixels[:, 90:] = pixels[:, 90:].clip(1)
    path = write(tmp_path / "x.tif", pixels.transpose(2, 0, 1), nodata=0, **WHERE)
    out = tmp_path / "out"
    assert maskmatch("predict", export, path, "--out", out, "--polygons", "coco", "--polygons", "geojson")[0] == 0
    with rasterio.open(out / "ids" / "x.tif") as ids:
        assert ids.nodata == 255
        found = ids.read(1)
    assert (found[:, :90] == 255).all()
    assert (found[:, 90:] < 3).all()
    with rasterio.open(out / "confidence" / "x.tif") as confidence:
        assert (confidence.read(1)[:, :90] == 0).all()
    annotations = json.loads((out / "coco" / "x.json").read_text())["annotations"]
    assert {each["category_id"] for each in annotations} <= {0, 1, 2}
    assert sum(each["area"] for each in annotations) == 200 * 190


def test_a_truncated_tiff_among_good_images_is_listed(export, tmp_path, photos, photo, maskmatch):
    path = write(tmp_path / "x.tif", photo(1, 300, 280).transpose(2, 0, 1), compress="deflate")
    (photos / "cut.tif").write_bytes(path.read_bytes()[:30_000])
    code, _, err = maskmatch("predict", export, photos, "--out", tmp_path / "out")
    assert code == 1
    assert "cut.tif: not a readable TIFF" in err
    assert len(list((tmp_path / "out").glob("ids/**/*.png"))) == 4
    assert not list((tmp_path / "out").rglob("*cut*"))


def test_without_rasterio_one_line_names_the_extra(export, tmp_path, photos, photo, maskmatch, monkeypatch):
    write(photos / "x.tif", photo(1).transpose(2, 0, 1))
    monkeypatch.setitem(__import__("sys").modules, "rasterio", None)
    code, _, err = maskmatch("predict", export, photos, "--out", tmp_path / "out")
    assert code == 2
    assert "pip install 'maskmatch_scale[geo]'" in err
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
    code, _, err = maskmatch("predict", export, photos / "a.png", "--out", tmp_path / "out", "--polygons", "coco")
    assert code == 2
    assert "pip install 'maskmatch_scale[coco]'" in err
    # Without TIFFs and polygons neither is needed.
    assert maskmatch("predict", export, photos / "a.png", "--out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("kib", [40, 120, 400, 700])
def test_a_full_disk_is_one_line_and_leaves_no_half_map(export, tmp_path, photo, small_disk, maskmatch, kib):
    """Of files that GDAL writes: it does not raise every error of the disk."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 1200, 1100), np.uint8)
    path = write(tmp_path / "x.tif", noise)
    disk = small_disk(kib=kib)
    code, _, err = maskmatch("predict", export, path, "--out", disk.path / "out", "--no-overlay")
    assert code == 2
    assert "no room is left on this disk" in err
    assert "Traceback" not in err
    assert not list(disk.path.rglob(".*"))
    for left in disk.path.rglob("*.tif"):  # what is there is whole
        with rasterio.open(left) as file:
            assert file.read(1).shape == (1200, 1100)


@pytest.mark.parametrize("kib", range(240, 301, 12))
def test_a_map_that_the_disk_has_no_room_for_is_never_taken_for_written(small_disk, kib):
    """From 260 to 296 KiB GDAL raises nothing, neither in writing nor in closing."""
    values = np.random.default_rng(0).integers(0, 3, (1200, 1100), np.uint8)
    path = small_disk(kib=kib).path / "x.tif"

    def whole() -> None:
        with writing.write_tiff(path, values.shape, {}) as file:
            file.add(values)

    if kib >= 300:
        whole()
    else:
        with pytest.raises(OSError, match="No space left on device") as caught:
            whole()
        assert caught.value.filename == str(path)
