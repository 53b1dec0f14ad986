"""Which bands of a file are the model's channels: by name, by order, as is said; or one line that says what to say."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.bands import Band
from maskmatch_scale.data.images.file_bands import FileBands
from maskmatch_scale.data.images.tiff import open_tiff
from maskmatch_scale.data.writing import write_shards
from maskmatch_scale.data.writing.sources.image_folder import image_folder
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.export import load_export
from maskmatch_scale.export.write import export_run
from maskmatch_scale.train import train
from tests.bands.conftest import draw_bands, write_tiff
from tests.conftest import recipe_maker
from tests.data.banded import NAMES

BANDS = tuple(Band(name, 0, 4000) for name in NAMES)
rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def read(path, bands):
    with open_tiff(path, path.name, bands) as image:
        height, width = image.size_px
        return image.read(slice(0, height), slice(0, width)).numpy()


@given(st.permutations([*NAMES, "pan", None]))
def test_descriptions_that_name_the_channels_say_where_they_are(descriptions):
    places = FileBands(BANDS).places(len(descriptions), descriptions, "x")
    assert tuple(descriptions[place] for place in places) == NAMES


@given(st.permutations([*NAMES, "-", "-"]))
def test_what_is_said_counts_whatever_the_file_says(given):
    places = FileBands(BANDS, tuple(given)).places(7, [*reversed(NAMES), "nir", "pan"], "x")
    assert tuple(given[place] for place in places) == NAMES


@given(st.lists(st.sampled_from([None, "", "B4", "pan"]), min_size=5, max_size=5))
def test_as_many_bands_of_other_names_are_taken_in_their_order(descriptions):
    assert FileBands(BANDS).places(5, descriptions, "x") == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("count", "descriptions", "given", "said"),
    [
        (6, [None] * 6, None, r"6 bands, and .* red, green, blue, nir, swir; .* --bands red,green,blue,nir,swir,-$"),
        (5, ["blue", None, None, None, None], None, "--bands red,green,blue,nir,swir$"),
        (5, ["nir", "nir", "blue", "green", "red"], None, "--bands red,green,blue,nir,swir$"),
        (3, [None] * 3, None, "3 bands, and .* swir; name files that have them all$"),
        (5, [None] * 5, (*NAMES, "-"), "5 bands, and --bands names 6$"),
    ],
)
def test_what_cannot_be_told_is_refused_with_what_to_say(count, descriptions, given, said):
    with pytest.raises(BadSample, match=said) as error:
        FileBands(BANDS, given).places(count, descriptions, "x.tif")
    assert "\n" not in str(error.value)


def test_parts_of_a_file_are_the_mapped_bands(tmp_path):
    stored = draw_bands(3)
    expected = np.rint(stored / 4000 * 255).astype(np.uint8)
    turned = write_tiff(tmp_path / "turned.tif", stored[::-1], NAMES[::-1], tiled=True, blockxsize=64, blockysize=64)
    assert np.array_equal(read(turned, FileBands(BANDS)), expected)
    with open_tiff(turned.read_bytes(), "x", FileBands(BANDS)) as image:
        part = image.read(slice(10, 70), slice(33, 128)).numpy()
        assert np.array_equal(part, expected[:, 10:70, 33:])
        shown = np.asarray(image.shrunk(96, 128)).transpose(2, 0, 1)
        assert np.array_equal(shown, expected[:3])
    pages = [Image.fromarray(band) for band in stored]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert np.array_equal(read(tmp_path / "pages.tif", FileBands(BANDS)), expected)
    assert np.array_equal(FileBands(BANDS).read(tmp_path / "pages.tif", "x"), expected)


def test_pixels_without_data_are_0_as_in_shards(tmp_path):
    stored = draw_bands(3)
    stored[:, :20, :30] = 9999
    path = write_tiff(tmp_path / "x.tif", stored, nodata=9999)
    for planes in (read(path, FileBands(BANDS)), FileBands(BANDS).read(path, "x")):
        assert not planes[:, :20, :30].any()
        assert planes[:, 20:].any()
    with open_tiff(path, "x", FileBands(BANDS)) as image:
        assert not image.valid(slice(0, 10))[:, :30].any()
        assert image.valid(slice(20, 40)).all()


def test_floats_are_refused(tmp_path):
    path = write_tiff(tmp_path / "x.tif", draw_bands(1).astype(np.float32))
    with pytest.raises(BadSample, match="values of type float32"):
        read(path, FileBands(BANDS))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("red,green,blue,nir", "'swir' is not among them"),
        ("red,red,green,blue,nir,swir", "'red' is there twice"),
        ("red,green,blue,nir,swir,pan", "no channel 'pan', .*; write - for a band that is not used"),
    ],
)
def test_bands_that_do_not_fit_the_model_are_refused_before_anything(bands_runs, tiffs, tmp_path, cli, words, said):
    code, _, err = cli("predict", bands_runs("vit"), tiffs / "images", "--out", tmp_path / "out", "--bands", words)
    assert code == 2
    assert err.startswith(f"maskmatch: error: --bands {words}: ")
    assert err.count("\n") == 1
    assert re.search(said, err)
    assert not (tmp_path / "out").exists()


def test_files_are_told_one_by_one_and_bands_can_be_said(bands_runs, tmp_path, cli):
    stored = draw_bands(7)
    (tmp_path / "in").mkdir()
    write_tiff(tmp_path / "in" / "six.tif", np.concatenate([stored[:1], stored]))
    Image.fromarray(np.zeros((96, 128, 3), np.uint8)).save(tmp_path / "in" / "photo.jpg")
    run = bands_runs("vit")
    code, _, err = cli("predict", run, tmp_path / "in", "--out", tmp_path / "out")
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("maskmatch: skipped:")]
    assert len(lines) == 2
    assert "photo.jpg: 3 bands, and the model's channels are red, green, blue, nir, swir; name files" in lines[0]
    assert "six.tif: 6 bands, and" in lines[1]
    assert "--bands red,green,blue,nir,swir,-" in lines[1]
    said = ["--bands", "-,red,green,blue,nir,swir"]
    assert cli("predict", run, tmp_path / "in" / "six.tif", "--out", tmp_path / "said", *said)[0] == 0
    export_run(run, tmp_path / "export")
    expected = load_export(tmp_path / "export").predict(stored.transpose(1, 2, 0)).classes
    assert np.array_equal(np.array(Image.open(tmp_path / "said" / "ids" / "six.tif")), expected)
    assert json.loads((tmp_path / "said" / "predict.json").read_text())["bands"] == said[1].split(",")
    code, _, err = cli("predict", run, tmp_path / "in" / "six.tif", "--out", tmp_path / "said")
    assert code == 2
    assert "made with bands = " in err


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 5), np.float32), Image.new("RGB", (8, 8))]
)
def test_an_export_takes_stored_values_of_its_bands_alone(bands_runs, tmp_path, image):
    export_run(bands_runs("vit"), tmp_path / "export")
    with pytest.raises(ValueError, match=r"stored values of red, .*swir as uint8, uint16, int16 \(H, W, 5\)"):
        load_export(tmp_path / "export").predict(image)


@pytest.fixture(scope="module")
def plain_run(shapes, tmp_path_factory):
    return train(recipe_maker(shapes, tmp_path_factory.mktemp("plain"))(run={"steps": 1}))


def test_a_model_of_rgb_says_once_that_bands_are_not_used(plain_run, tmp_path, cli):
    (tmp_path / "in").mkdir()
    stored = (draw_bands(7)[:4] // 16).astype(np.uint8)
    for name in ("a", "b"):
        write_tiff(tmp_path / "in" / f"{name}.tif", stored, photometric="RGB", alpha="unspecified")
    code, _, err = cli("predict", plain_run, tmp_path / "in", "--out", tmp_path / "out")
    assert code == 0
    lines = [line for line in err.splitlines() if "not used" in line]
    assert len(lines) == 1
    assert "a.tif: channels [1, 2, 3] are red, green and blue, [4] are not used; --bands" in lines[0]
    said = ["--bands", "red,green,blue,-"]
    assert "not used" not in cli("predict", plain_run, tmp_path / "in", "--out", tmp_path / "said", *said)[2]
    for name in ("a", "b"):
        both = [np.array(Image.open(tmp_path / out / "ids" / f"{name}.tif")) for out in ("out", "said")]
        assert np.array_equal(*both)
    stored[3] = 255
    write_tiff(tmp_path / "alpha.tif", stored, photometric="RGB", alpha="yes")
    assert "not used" not in cli("predict", plain_run, tmp_path / "alpha.tif", "--out", tmp_path / "alpha")[2]


def test_a_model_of_rgb_takes_these_bands_of_shards(plain_run, bands, tmp_path, cli):
    assert cli("predict", plain_run, bands, "--out", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out" / "ids").rglob("*.png"))) == 9


def test_a_model_of_bands_refuses_plain_shards_by_name(bands_runs, shapes, tmp_path, cli):
    code, _, err = cli("predict", bands_runs("vit"), shapes, "--out", tmp_path / "out")
    assert code == 2
    assert "'nir' is no band of the data; its images are plain ones" in err
    assert err.count("\n") == 1


def test_a_shard_without_index_is_read_by_its_pages(bands_runs, bands, tmp_path, cli):
    shard = next(bands.glob("unlabelled-*.tar"))
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(shard, tmp_path / "moved")
    run = bands_runs("vit")
    assert cli("predict", run, moved, "--out", tmp_path / "alone")[0] == 0
    assert cli("predict", run, bands, "--out", tmp_path / "indexed")[0] == 0
    assert_same_maps(tmp_path / "alone", tmp_path / "indexed")


def test_a_shard_that_is_named_alone_has_the_bands_of_the_index_beside_it(bands_runs, tmp_path, cli):
    (tmp_path / "in").mkdir()
    write_tiff(tmp_path / "in" / "a.tif", draw_bands(3)[::-1])
    options = Options(bands=",".join(NAMES[::-1]), value_range="0:4000")
    write_shards(image_folder(tmp_path / "in", options), tmp_path / "shards", workers=1, progress=False)
    run, shards = bands_runs("vit"), tmp_path / "shards"
    (tmp_path / "list.txt").write_text("shards/unlabelled-000000.tar\n")
    named = {"folder": shards, "shard": shards / "unlabelled-000000.tar", "list": tmp_path / "list.txt"}
    for out, words in named.items():
        assert cli("predict", run, words, "--out", tmp_path / out)[0] == 0
        assert_same_maps(tmp_path / out, tmp_path / "folder")
    write_tiff(tmp_path / "in" / "a.tif", draw_bands(3))
    assert cli("predict", run, tmp_path / "in" / "a.tif", "--out", tmp_path / "file")[0] == 0
    assert np.array_equal(only_map(tmp_path / "file"), only_map(tmp_path / "shard"))


def test_bands_of_other_files_than_tiffs_are_not_ignored_by_a_model_of_rgb(plain_run, tmp_path, cli):
    (tmp_path / "in").mkdir()
    Image.fromarray(draw_bands(2)[:3].transpose(1, 2, 0).astype(np.uint8)).save(tmp_path / "in" / "a.png")
    code, _, err = cli("predict", plain_run, tmp_path / "in", "--out", tmp_path / "x", "--bands", "blue,green,red")
    assert code == 1
    assert "a.png: --bands blue,green,red says which bands of TIFFs are red, green and blue, and this is none" in err
    assert cli("predict", plain_run, tmp_path / "in", "--out", tmp_path / "y", "--bands", "red,green,blue")[0] == 0


def only_map(out):
    (path,) = (path for path in (out / "ids").rglob("*") if path.is_file())
    with rasterio.open(path) as file:
        return file.read(1)


def assert_same_maps(out, expected):
    paths = list((out / "ids").rglob("*.png"))
    assert paths
    for path in paths:
        assert np.array_equal(np.array(Image.open(path)), np.array(Image.open(expected / path.relative_to(out))))
