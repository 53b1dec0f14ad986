"""Batches of images with bands: from GeoTIFFs to tensors, and sources that lack a band."""

import shutil
from contextlib import closing

import numpy as np
import pytest

from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.data.batches.held_out import evaluation_samples
from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.tools.show import contact_sheet
from maskmatch_scale.data.tools.verify import verify
from maskmatch_scale.data.writing import write_shards
from maskmatch_scale.data.writing.sources.image_folder import image_folder
from maskmatch_scale.data.writing.sources.options import Options
from tests.conftest import rewrite_shard
from tests.data.banded import NAMES, measured, write_geotiffs
from tests.data.batches.common import make_batches

pytest.importorskip("rasterio")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_geotiffs(root / "files", count=8, labelled=6)
    options = {"classes": str(root / "files" / "names.txt"), "dev": "2", "bands": ",".join(NAMES)}
    source = image_folder(root / "files", Options(**options, value_range="0:4000,nir=0:5000"))
    write_shards(source, root / "shards", workers=1, progress=False)
    return root / "shards"


def test_evaluation_reads_the_channels_as_measured(scenes, make_recipe):
    data = make_recipe(data={"root": str(scenes), "channels": ["nir", "red"], "value_ranges": {"red": [100, 900]}}).data
    samples = list(evaluation_samples(data, "dev"))
    assert len(samples) == 2
    for sample in samples:
        bands, label = measured(int(sample.key))
        known = sample.label.numpy() != 255
        assert sample.image.shape == (2, 96, 128)
        for channel, (band, low, high) in zip(sample.image.numpy(), ((3, 0, 5000), (0, 100, 900)), strict=True):
            expected = np.rint(((bands[band] - float(low)) / (high - low) * 255).clip(0, 255))
            assert np.array_equal(channel[known], expected[known])
        assert np.array_equal(sample.label.numpy()[known], label[known])


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_have_the_channels_in_their_order(scenes, make_recipe, workers):
    def batch(**data):
        recipe = make_recipe(
            data={"root": str(scenes), "crop_px": 64, "workers": workers, **data}, method={"teacher_margin_px": 16}
        )
        made = make_batches(lambda **_: recipe)
        with closing(load_batches(made, 0, 3)) as batches:
            return next(batches), made

    every, made = batch()
    assert made.channel_names == NAMES
    assert every.labelled_images.shape == (2, 5, 64, 64)
    assert every.unlabelled_images.shape == (2, 5, 96, 96)
    some, _ = batch(channels=["swir", "nir", "red"])
    assert some.labelled_images.equal(every.labelled_images[:, [4, 3, 0]])
    assert some.unlabelled_images.equal(every.unlabelled_images[:, [4, 3, 0]])
    assert some.labels.equal(every.labels)
    wider, _ = batch(channels=["nir"], value_ranges={"nir": [0, 10_000]})
    assert 0.4 < float(wider.labelled_images.float().mean() / every.labelled_images[:, 3].float().mean()) < 0.6


def test_sources_must_have_the_bands_of_the_run(scenes, shapes, make_recipe):
    both = [{"root": str(scenes)}, {"root": str(shapes), "name": "photos", "stream": "unlabelled"}]
    with pytest.raises(DataError, match=f"{shapes}: data.channels: 'nir' is no band of the data; its images are plain"):
        make_batches(make_recipe, data={"root": str(scenes), "unlabelled": both})
    rgb = {"root": str(scenes), "unlabelled": both, "channels": ["red", "green", "blue"]}
    assert make_batches(make_recipe, data=rgb)[0].unlabelled_images.shape[1] == 3
    with pytest.raises(DataError, match=f"{scenes}: data.channels: 'uv' is no band"):
        make_batches(make_recipe, data={"root": str(scenes), "channels": ["uv"]})
    with pytest.raises(DataError, match="'nir' is no band of the data"):
        make_batches(make_recipe, data={"channels": ["nir"]})
    in_sequence = {"root": str(scenes), "unlabelled": [{"shards": f"{scenes}/unlabelled-*.tar"}]}
    with pytest.raises(DataError, match="has no index, so nobody knows its bands, and red, green"):
        make_batches(make_recipe, data=in_sequence)


def test_a_source_of_other_ranges_is_said(scenes, tmp_path, make_recipe):
    shutil.copytree(scenes, tmp_path / "other")
    index = tmp_path / "other" / "index.json"
    index.write_text(index.read_text().replace("5000.0", "4500.0"))
    assert index.read_text() != (scenes / "index.json").read_text()
    data = {"root": str(scenes), "unlabelled": [{"root": str(tmp_path / "other"), "name": "other"}]}
    (note,) = make_batches(make_recipe, data=data).notes
    said = "warning: source 'other' has other ranges of values than data.root: nir (0 to 4500), not nir (0 to 5000); "
    assert note.startswith(said)
    assert "data.value_ranges" in note
    for same in ({"value_ranges": {"nir": [0, 4000]}}, {"channels": ["red", "swir"]}):
        assert not make_batches(make_recipe, data=data | same).notes


def test_plain_data_takes_bands_of_the_same_names(scenes, shapes, make_recipe):
    made = make_batches(make_recipe, data={"unlabelled": [{"root": str(scenes), "stream": "unlabelled"}]})
    assert made.channel_names == ("red", "green", "blue")
    assert made[0].unlabelled_images.shape[1] == 3


def test_a_batch_has_room_for_its_channels():
    assert Batch.empty(2, 3, (4, 5), channels=7, margin_px=1).unlabelled_images.shape == (3, 7, 6, 7)


def test_tools_read_bands(scenes, tmp_path, maskmatch):
    sheet = contact_sheet(scenes, tmp_path / "sheet.png")
    assert sheet.stat().st_size > 10_000
    code, out, _ = maskmatch("shards", "verify", scenes)
    assert code == 0
    assert "bands: red 0:4000, green 0:4000, blue 0:4000, nir 0:5000, swir 0:4000" in out


def test_verify_names_an_image_without_the_bands(scenes, shapes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "copy")
    raw = ShardStream(root, "unlabelled")[0]
    rewrite_shard(root, raw.shard, {f"{raw.key}.tif": ShardStream(shapes, "unlabelled")[0].image})
    (fault,) = verify(root)
    assert (fault.reason, fault.key) == ("not_an_image", raw.key)
    assert "no TIFF; its index names bands" in fault.message


def test_others_shards_get_bands_by_index(scenes, tmp_path, maskmatch, make_recipe):
    out = tmp_path / "indexed"
    arguments = ("shards", "index", f"{scenes}/unlabelled-*.tar", out, "--workers", 1)
    code, _, err = maskmatch(*arguments, "--bands", "red,green,blue,nir,swir")
    assert (code, "--value-range LOW:HIGH must say" in err) == (2, True)
    code, said, _ = maskmatch(*arguments, "--bands", ",".join(NAMES), "--value-range", "0:4000,nir=0:5000")
    assert (code, "nir 0:5000" in said) == (0, True)
    assert list(verify(out)) == []
    data = {"root": str(scenes), "unlabelled": [{"root": str(out)}], "channels": ["nir"]}
    assert make_batches(make_recipe, data=data)[0].unlabelled_images.shape[1] == 1
    code, _, err = maskmatch(*arguments, "--add", "--bands", "red", "--value-range", "0:1")
    assert (code, "it has other bands or ranges of values" in err) == (2, True)
    assert maskmatch(*arguments, "--add")[0] == 0
    assert list(verify(out)) == []
