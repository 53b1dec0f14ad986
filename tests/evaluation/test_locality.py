"""What is measured of a segmenter beyond its mIoU, on a real split."""

import pytest
import torch
from torch.nn import functional as F

from maskmatch_scale.data.batches.held_out import evaluation_samples
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.evaluation.calibration import Reliability
from maskmatch_scale.evaluation.evaluate import evaluate_split
from maskmatch_scale.evaluation.locality import NEAR_PX, VISIBLE_SHARES, Masked, measure_locality
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.method.pseudo_labels import multi_scale_pseudo_labels
from maskmatch_scale.runs.evaluate import inference_of
from maskmatch_scale.runs.model import build_student


@pytest.fixture
def segmenter(make_recipe):
    recipe = make_recipe()
    return build_student(recipe, ShardIndex.load(recipe.data.root)).eval()


def test_the_same_numbers_twice_and_all_units_are_the_whole_image(make_recipe, segmenter):
    recipe = make_recipe(method={"scales": [1.0]})
    how, rounds = inference_of(recipe, segmenter, torch.device("cpu")), []
    found = measure_locality(segmenter, recipe, "val", how, 0.0, lambda: rounds.append(1))
    assert found == measure_locality(segmenter, recipe, "val", how, 0.0)
    assert len(rounds) == 5
    matrix = ConfusionMatrix(3, 255)
    evaluate_split(segmenter, recipe.data, "val", how, matrix)
    assert list(found["miou_visible"]) == [f"{share:g}" for share in VISIBLE_SHARES]
    assert found["miou_visible"]["1"] == pytest.approx(matrix.miou(), abs=1e-6)
    assert found["miou_visible"]["0.1"] != found["miou_visible"]["1"]
    assert list(found["miou_near_boundary"]) == [str(px) for px in NEAR_PX]
    assert set(found["boundary_iou_by_class"]) == {"ground", "square", "disc"}
    labels = found["pseudo_labels"]
    assert sum(row["pixels"] for row in labels["table"]) == int(matrix.counts.sum())
    assert labels["coverage"] == 1
    middle = sum(row["pixels"] * row["confidence"] for row in labels["table"]) / int(matrix.counts.sum())
    assert 0 < measure_locality(segmenter, recipe, "val", how, middle)["pseudo_labels"]["coverage"] < 1
    assert found["small_objects"] > 0


@pytest.mark.parametrize("margin", [0, 20])
def test_pseudo_labels_are_those_of_single_crops_and_each_pixel_counts_once(make_recipe, segmenter, margin):
    """Crops of 96 px in images of 96 × 128 px overlap: the second one counts from where the first ends."""
    recipe = make_recipe(data={"crop_px": 96}, method={"scales": [0.5, 1.0], "teacher_margin_px": margin})
    how = inference_of(recipe, segmenter, torch.device("cpu"))
    expected = Reliability(recipe.method.threshold)
    for sample in evaluation_samples(recipe.data, "val"):
        for left, own in ((0, slice(0, 96)), (32, slice(64, 96))):
            around = F.pad(sample.image, (margin,) * 4)[:, :, left : left + 96 + 2 * margin]
            pseudo, confidence = multi_scale_pseudo_labels(segmenter, how.normalise(around)[None], recipe.method.scales)
            pseudo, confidence = (maps[:, margin : margin + 96, margin : margin + 96] for maps in (pseudo, confidence))
            label = sample.label[:, left : left + 96]
            expected.update(confidence[0, :, own], pseudo[0, :, own], label[:, own])
    found = measure_locality(segmenter, recipe, "val", how, recipe.method.threshold)["pseudo_labels"]
    assert found["expected_error"] == pytest.approx(expected.expected_error(), abs=1e-7)
    assert [row["pixels"] for row in found["table"]] == [row["pixels"] for row in expected.table()]


def test_the_samples_are_closed_after_an_error(make_recipe, segmenter, monkeypatch):
    closed = []

    def samples(*_, **__):
        try:
            while True:
                yield None  # is no sample
        finally:
            closed.append(True)

    monkeypatch.setattr("maskmatch_scale.evaluation.locality.evaluation_samples", samples)
    recipe = make_recipe()
    with pytest.raises(AttributeError) as error:
        measure_locality(segmenter, recipe, "val", inference_of(recipe, segmenter, torch.device("cpu")), 0.95)
    assert closed == [True], error  # the error holds the frames, and by them the generator


def test_crops_that_are_not_whole_units_have_no_masked_figures(make_recipe, segmenter):
    recipe = make_recipe(data={"crop_px": 72}, method={"mask": {"keep": None}})
    found = measure_locality(segmenter, recipe, "val", inference_of(recipe, segmenter, torch.device("cpu")), 0.95)
    assert found["miou_visible"] == {}


def test_each_call_sees_other_units_and_as_many(segmenter, monkeypatch):
    seen = []
    monkeypatch.setattr(type(segmenter), "forward", lambda self, images, visible, mode: seen.append(visible))
    for _ in range(2):
        masked = Masked(segmenter, 0.3, "drop", seed=1)
        for _ in range(3):
            masked(torch.zeros(2, 3, 128, 128))
    assert [visible.shape for visible in seen] == [(2, 5)] * 6
    assert all(one.equal(other) for one, other in zip(seen[:3], seen[3:]))
    assert not seen[0].equal(seen[1])
