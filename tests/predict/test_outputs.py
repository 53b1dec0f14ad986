"""Each output read back by the library that people read it with, against the classes and probabilities themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.evaluation.inference import Inference
from maskmatch_scale.evaluation.windows import Block
from maskmatch_scale.export import load_export
from maskmatch_scale.predict.outputs import Outputs, Wanted
from maskmatch_scale.predict.reading import DecodedImage
from maskmatch_scale.predict.rows import rows_of
from maskmatch_scale.recipe import EvaluationRecipe
from tests.predict.conftest import PALETTE

CLASSES = ("ground", "square", "a disc, ä")


@pytest.fixture
def predicted(export, photo):
    """An image with its prediction by the export, from Python."""
    pixels = photo(1, 150, 230)
    return pixels, load_export(export).predict(pixels, probabilities=True)


@pytest.fixture
def files(predicted, export, tmp_path):
    """All outputs of that image, by kind."""
    pixels, _ = predicted
    segmenter = load_export(export)
    image = DecodedImage(torch.from_numpy(pixels).permute(2, 0, 1))
    inference = Inference(
        EvaluationRecipe(window_batch=3),
        (64, 64),
        segmenter.patch_px,
        segmenter.unit_px,
        segmenter.mean,
        segmenter.std,
        torch.device("cpu"),
    )
    wanted = Wanted(probabilities=True, polygons=("coco", "geojson"))
    outputs = Outputs(tmp_path, wanted, CLASSES, PALETTE, 3, 100)
    with outputs.writing("x/photo", image) as write:
        for rows in rows_of(inference.blocks(segmenter, image), image, probabilities=True):
            write(rows)
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert outputs.finished("x/photo", tiff=False, since_ns=0)
    return outputs.paths("x/photo", tiff=False)


def test_ids_have_the_classes_and_the_palette(files, predicted):
    with Image.open(files["ids"]) as ids:
        assert ids.mode == "P"
        assert ids.getpalette()[:9] == [channel for colour in PALETTE for channel in colour]
        assert np.array_equal(np.array(ids), predicted[1].classes)
        colours = np.array(ids.convert("RGB"))
    assert np.array_equal(colours, np.array(PALETTE, np.uint8)[predicted[1].classes])


def test_confidence_is_the_probability_in_255ths(files, predicted):
    with Image.open(files["confidence"]) as confidence:
        assert confidence.convert("L").size == (230, 150)
        found = np.array(confidence.convert("L"))
    assert np.abs(found / 255 - predicted[1].confidence).max() <= 0.5 / 255 + 1e-6


def test_probabilities_are_an_npz_of_all_classes(files, predicted):
    with np.load(files["probabilities"]) as stored:
        assert stored["classes"].tolist() == list(CLASSES)
        found = stored["probabilities"]
    assert (found.dtype, found.shape) == (np.float16, (150, 230, 3))
    assert np.abs(found.transpose(2, 0, 1) - predicted[1].probabilities).max() < 1e-3


def test_coco_masks_are_the_classes(files, predicted):
    mask = pytest.importorskip("pycocotools.mask")
    coco = pytest.importorskip("pycocotools.coco").COCO(files["coco"])
    found = np.full((150, 230), 99)
    for annotation in coco.loadAnns(coco.getAnnIds()):
        decoded = coco.annToMask(annotation).astype(bool)
        assert decoded.sum() == annotation["area"] == mask.area(annotation["segmentation"])
        found[decoded] = annotation["category_id"]
    assert np.array_equal(found, predicted[1].classes)
    assert [each["name"] for each in coco.loadCats(coco.getCatIds())] == list(CLASSES)


def test_polygons_filled_again_are_the_classes(files, predicted):
    features = pytest.importorskip("rasterio.features")
    content = json.loads(files["geojson"].read_text())
    shapes = [(each["geometry"], each["properties"]["value"]) for each in content["features"]]
    assert np.array_equal(features.rasterize(shapes, (150, 230), fill=99), predicted[1].classes)
    names = {each["properties"]["value"]: each["properties"]["class"] for each in content["features"]}
    assert names == dict(enumerate(CLASSES))
    assert "crs" not in content


def test_an_overlay_is_shrunk_and_has_a_legend_below(files, predicted):
    with Image.open(files["overlay"]) as overlay:
        picture = np.array(overlay).astype(int)
    assert picture.shape[1] == 480  # room for the legend
    assert picture.shape[0] > 65
    classes = predicted[1].classes
    rows, columns = (((np.arange(n) + 0.5) * side / n).astype(int) for n, side in ((65, 150), (100, 230)))
    shown = classes[rows][:, columns]
    # In the JPEG, the mean of each class's pixels leans to its colour.
    red, blue = (picture[:65, :100][shown == value].mean(0) for value in (1, 2))
    assert red[0] > red[2] + 80
    assert blue[2] > blue[0] + 80


def test_a_failure_within_an_image_leaves_nothing_of_it(tmp_path, photo):
    image = DecodedImage(torch.from_numpy(photo(1)).permute(2, 0, 1))
    outputs = Outputs(tmp_path, Wanted(probabilities=True), CLASSES, PALETTE, 3, 100)
    block = Block(slice(0, 50), slice(0, 128), torch.full((3, 50, 128), 1 / 3))

    def half() -> None:
        with outputs.writing("photo", image) as write:
            for rows in rows_of([block], image, probabilities=True):
                write(rows)
            raise BadSample("not_an_image", "the rest cannot be read")

    with pytest.raises(BadSample):
        half()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
