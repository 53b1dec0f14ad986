import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from maskmatch_scale.evaluation.miou import ConfusionMatrix


@given(classes=st.integers(2, 7), seed=st.integers(0, 2**31), batches=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_equals_torchmetrics_over_classes_that_occur(classes, seed, batches):
    draw = torch.Generator().manual_seed(seed)
    matrix = ConfusionMatrix(classes, 255)
    pred = torch.randint(classes, (batches, 9, 11), generator=draw)
    target = torch.randint(classes, (batches, 9, 11), generator=draw)
    target[torch.rand(target.shape, generator=draw) < 0.2] = 255
    for p, t in zip(pred, target):
        matrix.update(p, t)
    reference = MulticlassJaccardIndex(classes, ignore_index=255, average=None)(pred, target)
    occurs = torch.tensor([bool(((pred == c) | (target == c))[target != 255].any()) for c in range(classes)])
    assert matrix.iou().isnan().equal(~occurs)
    torch.testing.assert_close(matrix.iou()[occurs].float(), reference[occurs])
    assert matrix.miou() == pytest.approx(float(matrix.iou()[occurs].mean()))
    assert matrix.pixel_accuracy() == pytest.approx(float((pred == target)[target != 255].double().mean()))


def test_one_matrix_over_all_images_not_a_mean_over_images():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0]))
    matrix.update(torch.tensor([1, 1]), torch.tensor([1, 1]))
    assert matrix.iou().tolist() == [3 / 4, 2 / 3]


def test_values_outside_the_classes():
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match="target has values outside 0 … 1"):
        matrix.update(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="differ in shape"):
        matrix.update(torch.zeros(2), torch.zeros(3))
