"""`--bands` and `--value-range`: what is stored, found, said and refused."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.bands import Band, choose_channels
from maskmatch_scale.data.images.decode import decode_image
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.writing.sources import band_ranges
from maskmatch_scale.data.writing.sources.band_options import given_bands, parse_bands, parse_ranges
from maskmatch_scale.data.writing.sources.band_ranges import find_bands
from maskmatch_scale.data.writing.sources.plain_tiff import refuse_lost_bands
from maskmatch_scale.errors import UserError
from tests.data.banded import NAMES, measured, write_geotiffs

rasterio = pytest.importorskip("rasterio")
FIVE = ("--bands", ",".join(NAMES))


pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture
def scenes(tmp_path):
    write_geotiffs(tmp_path / "scenes", count=6, labelled=4)
    return tmp_path / "scenes"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def write(run, source, out, *options):
    classes = ("--classes", source / "names.txt") if (source / "names.txt").is_file() else ()
    return run("folder", source, out, *classes, *options)


def pages(root, stream, key):
    """The stored values of a sample, (bands, H, W), and its label map."""
    index = ShardStream(root, stream).index
    raw = next(raw for raw in ShardStream(root, stream) if raw.key == key)
    found = []
    with Image.open(io.BytesIO(raw.image)) as image:
        for number in range(len(index.bands)):
            image.seek(number)
            found.append(np.asarray(image).copy())
    label = None if raw.label is None else np.asarray(Image.open(io.BytesIO(raw.label)))
    return np.stack(found), label


def save(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    size = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with rasterio.open(path, "w", driver="PNG" if path.suffix == ".png" else "GTiff", **size, **options) as file:
        file.write(values)


def test_values_are_stored_as_measured(run, scenes, out, shards):
    code, err = write(run, scenes, out, *FIVE, "--value-range", "0:3000,nir=0:5000")
    assert (code, "auto" in err) == (0, False)
    found = shards(out)  # verifies
    assert {name: len(samples) for name, samples in found.streams.items()} == {"labelled": 4, "unlabelled": 2}
    assert all(sorted(sample) == ["png", "tif"] for sample in found.streams["labelled"].values())
    assert found.index.bands == tuple(Band(name, 0, 5000 if name == "nir" else 3000) for name in NAMES)
    for number in (1, 2, 3):
        stored, label = pages(out, "labelled", f"{number:02d}")
        bands, expected = measured(number)
        assert stored.dtype == np.uint16
        assert np.array_equal(stored, bands)
        assert np.array_equal(label, expected)


def test_pixels_without_data_are_ignored_and_said(run, scenes, out):
    code, err = write(run, scenes, out, *FIVE, "--value-range", "100:3000")
    share = 2 * 200 / (6 * 96 * 128)
    assert f"2 of 6 images looked at have pixels without data, {share:.1%} of all pixels" in err
    stored, label = pages(out, "labelled", "00")
    bands, expected = measured(0)
    assert (stored[:, :10, :20] == 100).all()
    assert np.array_equal(stored[:, 10:], bands[:, 10:])
    assert (label[:10, :20] == 255).all()
    assert np.array_equal(label[10:], expected[10:])
    assert code == 0


def test_16_bits_need_a_range(run, scenes, out):
    code, err = write(run, scenes, out, *FIVE)
    known = np.ones((6, 96, 128), bool)
    known[::4, :10, :20] = False
    reds = np.stack([measured(number)[0][0] for number in range(6)])[known]
    assert code == 2
    assert err.count("\n") == 1
    assert "these images have 16 bits" in err
    assert "In 6 images looked at" in err
    assert f"red {reds.min()} to {reds.max()}, green" in err
    assert "12-bit data? --value-range 0:4095" in err
    assert not list(out.glob("*.tar"))


def test_auto_is_percentiles_said_kept_and_the_same_at_a_restart(run, scenes, out, contents):
    code, err = write(run, scenes, out, *FIVE, "--value-range", "auto,swir=0:4000")
    assert code == 0
    index = json.loads((out / "index.json").read_text())
    bands = {band["name"]: (band["low"], band["high"]) for band in index["bands"]}
    values = [measured(n)[0] for n in range(6)]
    whole = np.concatenate([v[3, 10:] if n in (0, 4) else v[3] for n, v in enumerate(values)])
    low, high = np.percentile(whole, (0.5, 99.5))
    assert abs(bands["nir"][0] - low) <= 0.03 * (high - low)
    assert abs(bands["nir"][1] - high) <= 0.03 * (high - low)
    assert bands["swir"] == (0, 4000)
    assert f"nir {bands['nir'][0]:g}:{bands['nir'][1]:g}" in err
    assert index["settings"]["value_ranges"]["nir"] == list(bands["nir"])
    before = contents(out)
    assert write(run, scenes, out, *FIVE, "--value-range", "auto,swir=0:4000")[0] == 0
    assert contents(out) == before
    code, err = write(run, scenes, out, *FIVE, "--value-range", "auto")
    assert (code, "value_ranges" in err) == (2, True)


def test_a_band_may_be_left_out(run, scenes, out):
    assert write(run, scenes, out, "--bands", "red,-,blue,nir,-", "--value-range", "0:4000")[0] == 0
    stored, _ = pages(out, "labelled", "01")
    assert np.array_equal(stored, measured(1)[0][[0, 2, 3]])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bands", "red,green"), "5 bands, but --bands red,green names 2"),
        (("--bands", "red,red,blue,nir,swir"), "two bands are called 'red'"),
        (("--bands", "-,-,-,-,-"), "no band is left"),
        (("--bands", "red,,blue"), "a name a band"),
        (("--value-range", "0:3000"), "--bands must name the bands"),
        ((*FIVE, "--value-range", "3000:0"), "write LOW:HIGH"),
        ((*FIVE, "--value-range", "3000"), "write LOW:HIGH"),
        ((*FIVE, "--value-range", "uv=0:3000"), "there is no band 'uv', but red, green"),
        ((), "a TIFF of 5 bands of uint16; name each: --bands red,green,blue,…"),
    ],
)
def test_what_is_refused(run, scenes, out, options, said):
    code, err = write(run, scenes, out, *options)
    assert (code, said in err, "Traceback" in err) == (2, True, False), err


def test_8_bits_need_no_range(run, tmp_path, out):
    values = np.random.default_rng(0).integers(0, 255, (4, 20, 30), dtype=np.uint8, endpoint=True)
    save(tmp_path / "s" / "a.tif", values)
    code, err = write(run, tmp_path / "s", tmp_path / "plain")
    assert (code, "band 4 is declared as transparency but has" in err) == (2, True)
    assert "--bands red,green,blue,nir or, without the fourth, red,green,blue,-" in err
    assert write(run, tmp_path / "s", out, "--bands", "red,green,blue,nir")[0] == 0
    stored, _ = pages(out, "unlabelled", "a")
    assert np.array_equal(stored, values)  # the fourth is 0 in places: these have data
    assert ShardStream(out, "unlabelled").index.bands[3] == Band("nir", 0, 255)


def test_a_few_of_16_bits_among_8_are_named(run, tmp_path, out):
    for number in range(70):
        kind = np.uint16 if number == 31 else np.uint8
        save(tmp_path / "s" / f"{number}.tif", np.full((2, 4, 4), number, kind))
    code, err = write(run, tmp_path / "s", out, "--bands", "vv,vh")
    assert code == 2
    assert "31.tif: values of type uint16, but others have 8 bits" in err or "these images have 16 bits" in err
    assert write(run, tmp_path / "s", out, "--bands", "vv,vh", "--value-range", "0:255")[0] == 0


def test_signed_values_keep_their_sign(run, tmp_path, out):
    values = np.random.default_rng(0).integers(-1000, 3000, (1, 16, 16), dtype=np.int16)
    save(tmp_path / "s" / "ct.tif", values)
    code, err = write(run, tmp_path / "s", tmp_path / "plain")
    assert (code, "a TIFF of 1 band of int16; name each: --bands grey" in err) == (2, True)
    assert write(run, tmp_path / "s", out, "--bands", "ct", "--value-range", "-1000:400")[0] == 0
    raw = next(iter(ShardStream(out, "unlabelled")))
    image = decode_image(raw.image, raw.name, channels=choose_channels(ShardStream(out, "unlabelled").index.bands))
    assert np.array_equal(image[0], np.rint(((values[0].astype(float) + 1000) / 1400 * 255).clip(0, 255)))


def test_png_of_16_bits_keeps_all_of_them(run, tmp_path, out):
    values = np.random.default_rng(0).integers(0, 65535, (3, 16, 16), dtype=np.uint16)
    save(tmp_path / "s" / "a.png", values)
    assert write(run, tmp_path / "s", out, "--bands", "red,green,blue", "--value-range", "0:65535")[0] == 0
    assert np.array_equal(pages(out, "unlabelled", "a")[0], values)


def test_other_formats_have_8_bits(run, tree, out):
    tree.image("a.webp", lossless=True)
    tree.save("b.bmp", Image.new("RGB", (12, 8), (1, 2, 3)))
    assert write(run, tree.root, out, "--bands", "red,green,-")[0] == 0
    assert (pages(out, "unlabelled", "b")[0] == np.array([1, 2])[:, None, None]).all()


def test_pages_become_bands(run, tmp_path, out):
    values = np.random.default_rng(0).integers(0, 4000, (3, 16, 16), dtype=np.uint16)
    (tmp_path / "s").mkdir()
    first, *more = (Image.fromarray(page) for page in values)
    first.save(tmp_path / "s" / "a.tif", save_all=True, append_images=more)
    code, err = write(run, tmp_path / "s", tmp_path / "plain")
    assert (code, "a TIFF of 3 pages; name each: --bands" in err) == (2, True)
    assert write(run, tmp_path / "s", out, "--bands", "a,b,c", "--value-range", "auto")[0] == 0
    assert np.array_equal(pages(out, "unlabelled", "a")[0], values)


def test_overviews_and_masks_are_no_bands(run, tmp_path, out):
    path = tmp_path / "s" / "a.tif"
    save(path, np.random.default_rng(0).integers(0, 255, (3, 64, 64), dtype=np.uint8))
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4])
        file.write_mask(np.ones((64, 64), np.uint8) * 255)
    assert write(run, tmp_path / "s", out)[0] == 0


def test_floats_are_refused_with_what_to_do(run, tmp_path, out):
    save(tmp_path / "s" / "a.tif", np.zeros((2, 8, 8), np.float32))
    for options in ((), ("--bands", "vv,vh", "--value-range", "0:1")):
        code, err = write(run, tmp_path / "s", out / str(len(options)), *options)
        assert (code, "float32" in err, "gdal_translate -ot UInt16 -scale" in err) == (2, True, True), err


def test_large_images_are_shrunk(run, scenes, out):
    assert write(run, scenes, out, *FIVE, "--value-range", "0:3000", "--max-side", "64")[0] == 0
    stored, label = pages(out, "labelled", "01")
    assert stored.shape == (5, 48, 64)
    assert label.shape == (48, 64)
    assert np.abs(stored.mean((1, 2)) - measured(1)[0].mean((1, 2))).max() < 20


def test_of_huge_images_some_windows_are_read(tmp_path, monkeypatch):
    values = np.arange(200 * 300, dtype=np.uint16).reshape(1, 200, 300)
    save(tmp_path / "a.tif", values, nodata=0)
    whole = find_bands("a", "auto", tmp_path, ["a.tif"]).rule.bands[0]
    monkeypatch.setattr(band_ranges, "_HUGE_PX", 1000)
    monkeypatch.setattr(band_ranges, "_WINDOW_PX", 8)
    some = find_bands("a", "auto", tmp_path, ["a.tif"]).rule.bands[0]
    assert some != whole
    assert some.low < 0.2 * values.max()
    assert some.high > 0.8 * values.max()


def test_a_file_is_looked_at_by_its_path_as_by_its_bytes(tmp_path):
    draw = np.random.default_rng(0)
    for count in (1, 2, 3, 4, 5):
        for kind in (np.uint8, np.uint16):
            path = tmp_path / f"{count}-{np.dtype(kind)}.tif"
            save(path, draw.integers(0, 250, (count, 20, 30)).astype(kind))
            said = []
            for data in (path, path.read_bytes()):
                try:
                    refuse_lost_bands(data, "x")
                    said.append(None)
                except BadSample as bad:
                    said.append(str(bad))
            assert said[0] == said[1]
            assert (said[0] is None) == (count == 1 or (count == 3 and kind == np.uint8))


def test_settings_without_bands_stay_as_they_were(run, tree, out):
    tree.image("a.jpg")
    assert write(run, tree.root, out)[0] == 0
    index = json.loads((out / "index.json").read_text())
    assert "bands" not in index
    assert not {"bands", "value_ranges"} & index["settings"].keys()


def test_options_of_bands():
    assert parse_bands("red, nir,-") == ("red", "nir", "-")
    assert parse_ranges("auto,nir=-5:1e3", ["red", "nir"]) == {"red": None, "nir": (-5, 1000)}
    assert parse_ranges("nir=0:1,0:9", ["red", "nir"]) == {"red": (0, 9), "nir": (0, 1)}
    assert parse_ranges(None, ["red"]) == {}
    assert given_bands("a,b", "0:10,b=1:2") == (Band("a", 0, 10), Band("b", 1, 2))
    for names, ranges in (("a,b", "a=0:1"), ("a,b", None), ("a,-", "0:1"), ("a", "auto")):
        with pytest.raises(UserError):
            given_bands(names, ranges)
