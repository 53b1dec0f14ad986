import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassCalibrationError

from maskmatch_scale.evaluation.calibration import Reliability


@given(classes=st.integers(2, 6), seed=st.integers(0, 2**31), bins=st.integers(2, 25))
@settings(max_examples=30, deadline=None)
def test_the_error_is_that_of_torchmetrics(classes, seed, bins):
    draw = torch.Generator().manual_seed(seed)
    probabilities = (3 * torch.randn(2, classes, 9, 7, generator=draw)).softmax(1)
    target = torch.randint(classes, (2, 9, 7), generator=draw)
    target[torch.rand(target.shape, generator=draw) < 0.2] = 255
    confidence, pred = probabilities.max(1)
    metric = Reliability(0.7, bins=bins)
    for each in zip(confidence, pred, target):
        metric.update(*each)
    reference = MulticlassCalibrationError(classes, n_bins=bins, norm="l1", ignore_index=255)(probabilities, target)
    assert metric.expected_error() == pytest.approx(float(reference), abs=1e-5)
    known = target != 255
    sure = (confidence >= 0.7) & known
    assert metric.above.tolist() == [int(sure.sum()), int((sure & (pred == target)).sum())]


def test_by_hand():
    metric = Reliability(0.95, bins=4)
    confidence = torch.tensor([0.3, 0.4, 0.95, 1.0, 0.99])
    metric.update(confidence, torch.tensor([1, 1, 2, 2, 2]), torch.tensor([1, 0, 2, 2, 255], dtype=torch.uint8))
    assert metric.above.tolist() == [2, 2]  # 0.95 counts, also in float32
    low, high = metric.table()
    assert low == {"from": 0.25, "pixels": 2, "accuracy": 0.5, "confidence": pytest.approx(0.35)}
    assert high == {"from": 0.75, "pixels": 2, "accuracy": 1.0, "confidence": pytest.approx(0.975)}
    assert metric.expected_error() == pytest.approx((2 * 0.15 + 2 * 0.025) / 4)
