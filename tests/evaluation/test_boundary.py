import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.evaluation.boundary import BoundaryIou, NearBoundary, near_contour

SQUARE = torch.zeros(12, 12, dtype=torch.uint8)
SQUARE[3:9, 3:9] = 1
ALL = torch.ones(12, 12, dtype=torch.bool)


def eroded(mask, times):
    """By a square of 3 × 3 px, the outside of the image empty, as `mask_to_boundary` of the authors' code."""
    for _ in range(times):
        padded = torch.zeros(mask.shape[0] + 2, mask.shape[1] + 2, dtype=torch.bool)
        padded[1:-1, 1:-1] = mask
        mask = torch.stack(
            [padded[r : r + mask.shape[0], c : c + mask.shape[1]] for r in range(3) for c in range(3)]
        ).all(0)
    return mask


@given(size=st.tuples(st.integers(1, 14), st.integers(1, 14)), distance=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_contours_are_those_of_the_authors_erosion(size, distance, seed):
    classes = torch.randint(3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    expected = torch.zeros(size, dtype=torch.bool)
    for value in range(3):
        expected |= (classes == value) & ~eroded(classes == value, distance)
    assert near_contour(classes, distance, classes < 3, border=True).equal(expected)


def test_ignored_pixels_make_no_contour():
    classes = SQUARE.clone()
    classes[:, 6:] = 255
    near = near_contour(classes, 1, classes != 255)
    assert not near[:, 6:].any()
    assert near[5].tolist() == [False, False, True, True, *[False] * 8]


def test_boundary_iou_by_hand():
    """A square of 6 px and one shifted by 1 px, d = 1: rings of 20 px."""
    shifted = SQUARE.roll(1, 1)
    metric = BoundaryIou(2, share=0.01)  # less than a pixel: 1
    metric.update(shifted, SQUARE)
    ring = near_contour(SQUARE, 1, ALL, border=True) & (SQUARE == 1)
    assert int(ring.sum()) == 20
    common = int((ring & ring.roll(1, 1)).sum())
    assert metric.counts[:, 1].tolist() == [common, 20, 20]
    assert common == 10  # of the two long sides; short sides lie beside each other
    assert float(metric.iou()[1]) == pytest.approx(10 / 30)
    same = BoundaryIou(3)
    same.update(SQUARE, SQUARE)
    assert same.iou()[:2].tolist() == [1, 1]
    assert same.iou()[2].isnan()


def test_what_is_ignored_in_the_label_counts_nowhere():
    label, wrong = SQUARE.clone(), SQUARE.clone()
    label[:, 9:] = 255
    wrong[:, 10:] = 1
    metric = BoundaryIou(2)
    metric.update(wrong, label)
    assert metric.iou().tolist() == [1, 1]


def test_a_prediction_of_the_class_that_labels_ignore_counts_where_the_label_is_known():
    """Class 0 is ignored in labels. A square of 6 px of class 1 in class 2; the prediction lacks its row."""
    label, pred = torch.full((12, 12), 2), torch.full((12, 12), 2)
    label[3:9, 3:9], pred[3:9, 3:9] = 1, 1
    pred[5] = 0
    label[11] = 0
    metric = BoundaryIou(3, ignore_index=0, share=0.01)
    metric.update(pred, label)
    common, _, predicted = metric.counts
    assert predicted[0] == 12  # the whole row is a contour
    # Of the square's ring of 20 px all but the two of that row. In the prediction rows 4 and 6 are contours too.
    assert (common[1], predicted[1]) == (18, 18 + 8)


def test_near_a_boundary_by_hand():
    """Within 1 px of the square's contour lie 20 px in it and 28 outside, which a prediction without it hits."""
    metric = NearBoundary(2, (1, 2))
    metric.update(torch.zeros_like(SQUARE), SQUARE)
    assert metric.matrices[1].counts.tolist() == [[28, 0], [20, 0]]
    assert metric.matrices[2].counts.tolist() == [[28 + 36, 0], [32, 0]]
    assert metric.matrices[1].miou() == pytest.approx(28 / 48 / 2)
