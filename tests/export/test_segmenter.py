"""Predicting by an export from Python."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.errors import UserError
from maskmatch_scale.export import load_export
from maskmatch_scale.export.write import export_run
from maskmatch_scale.recipe import EvaluationRecipe
from maskmatch_scale.runs.evaluate import inference_of
from maskmatch_scale.runs.model import open_run
from tests.conftest import draw_shapes
from tests.export.test_export import untrained_run


@pytest.fixture
def run(make_recipe):
    recipe = make_recipe(evaluation={"window_px": 96, "overlap": 0.5, "scales": [1.0, 0.5], "flip": True})
    untrained_run(recipe)
    return recipe.run.dir


@pytest.fixture
def exported(run, tmp_path):
    export_run(tmp_path / "run", tmp_path / "out")
    return tmp_path / "out"


def photo():
    return np.tile(draw_shapes(3)[0], (2, 2, 1))[:150, :170].copy()


def test_an_image_is_predicted_as_the_run_evaluates_it(exported, tmp_path):
    pixels = photo()
    recipe, segmenter, _ = open_run(tmp_path / "run", "ema")
    inference = inference_of(recipe, segmenter, torch.device("cpu"))
    classes, confidence = inference.predict_confidently(segmenter, torch.from_numpy(pixels).permute(2, 0, 1))
    found = load_export(exported).predict(pixels)
    assert np.array_equal(found.classes, classes)
    assert np.array_equal(found.confidence, confidence)
    assert (found.classes.dtype, found.confidence.dtype) == (np.uint8, np.float32)
    assert found.probabilities is None


def test_paths_pillow_images_and_arrays_are_the_same_image(exported, tmp_path):
    Image.fromarray(photo()).save(tmp_path / "x.png")
    Image.fromarray(photo()).save(tmp_path / "x.bmp")
    segmenter = load_export(exported)
    expected = segmenter.predict(photo(), probabilities=True)
    assert expected.probabilities.shape == (3, 150, 170)
    assert np.abs(expected.probabilities.sum(0) - 1).max() < 1e-5
    assert np.array_equal(expected.probabilities.argmax(0), expected.classes)
    assert np.array_equal(expected.probabilities.max(0), expected.confidence)
    for image in (tmp_path / "x.png", str(tmp_path / "x.bmp"), Image.fromarray(photo())):
        assert np.array_equal(segmenter.predict(image).confidence, expected.confidence)


def test_settings_can_be_others(exported):
    segmenter = load_export(exported)
    one = segmenter.predict(photo(), evaluation=EvaluationRecipe(mode="whole"))
    assert not np.array_equal(one.confidence, segmenter.predict(photo()).confidence)
    with pytest.raises(UserError, match="smaller than a unit"):
        segmenter.predict(photo(), evaluation=EvaluationRecipe(window_px=(32, 32), scales=(0.5,)))


def test_orientation_is_that_of_training(exported, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo()).save(tmp_path / "x.png", exif=exif)
    described = json.loads((exported / "segmenter.json").read_text())
    assert described["exif_orientation"] is False
    for turned, size in ((False, (150, 170)), (True, (170, 150))):
        (exported / "segmenter.json").write_text(json.dumps(described | {"exif_orientation": turned}))
        segmenter = load_export(exported)
        with Image.open(tmp_path / "x.png") as image:
            found = [segmenter.predict(tmp_path / "x.png"), segmenter.predict(image)]
        assert [each.classes.shape for each in found] == [size, size]
        assert np.array_equal(found[0].confidence, found[1].confidence)


def test_an_export_of_before_predicts_in_windows_of_its_crop(exported):
    described = json.loads((exported / "segmenter.json").read_text())
    del described["evaluation"], described["exif_orientation"]
    (exported / "segmenter.json").write_text(json.dumps(described))
    segmenter = load_export(exported)
    assert segmenter.description.evaluation == EvaluationRecipe()
    expected = segmenter.predict(photo(), evaluation=EvaluationRecipe(window_px=(64, 64)))
    assert np.array_equal(segmenter.predict(photo()).confidence, expected.confidence)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((9, 9), np.uint8), r"uint8 \(9, 9\)"),
        (np.zeros((9, 9, 3), np.float32), "float32"),
        (torch.zeros(3, 9, 9), "Tensor"),
        (Image.fromarray(np.zeros((9, 9), np.float32)), "mode F"),
        (Image.fromarray(np.zeros((9, 9), np.uint16)), "mode I;16"),
    ],
)
def test_other_things_are_refused(exported, image, said):
    with pytest.raises(ValueError, match=said):
        load_export(exported).predict(image)


def test_a_file_that_is_no_image_is_a_bad_sample(exported, tmp_path):
    with pytest.raises(BadSample, match="not a readable image"):
        load_export(exported).predict(exported / "segmenter.json")
    with pytest.raises(BadSample, match="No such file"):
        load_export(exported).predict(tmp_path / "gone.png")
