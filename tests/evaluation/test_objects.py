import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.evaluation.objects import SmallObjects, components


def flooded(classes):
    """Components by walking from pixel to pixel."""
    number = torch.full(classes.shape, -1)
    for start in torch.cartesian_prod(*map(torch.arange, classes.shape)).view(-1, 2).tolist():
        if number[tuple(start)] >= 0:
            continue
        open_pixels = [start]
        while open_pixels:
            y, x = open_pixels.pop()
            if not (0 <= y < classes.shape[0] and 0 <= x < classes.shape[1]) or number[y, x] >= 0:
                continue
            if classes[y, x] == classes[tuple(start)]:
                number[y, x] = start[0] * classes.shape[1] + start[1]
                open_pixels += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return number


def check(label):
    """Numbers and classes of the components against those of a walk."""
    number, classes = components(label)
    firsts, expected = flooded(label).unique(return_inverse=True)
    assert number.dtype == torch.int32
    assert number.long().equal(expected)
    assert classes.equal(label.flatten()[firsts])


@given(size=st.tuples(st.integers(1, 12), st.integers(1, 12)), classes=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_components_are_those_of_a_walk(size, classes, seed):
    label = torch.randint(classes, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    check(label)


def test_a_spiral_is_one_object():
    spiral = torch.zeros(41, 41, dtype=torch.uint8)
    top, left, bottom, right = 0, 0, 40, 40
    while top < bottom:
        spiral[top, left : right + 1] = spiral[top : bottom + 1, right] = 1
        spiral[bottom, left + 2 : right + 1] = spiral[top + 2 : bottom + 1, left + 2] = 1
        top, left, bottom, right = top + 4, left + 4, bottom - 4, right - 4
    check(spiral)


def test_recall_by_hand():
    label = torch.zeros(20, 20, dtype=torch.uint8)
    label[2:4, 2:4] = 1  # 4 px, 2 of them found: half is enough
    label[10:13, 10:13] = 1  # 9 px, 4 of them found
    label[0, 19] = 2
    label[15:, 15:] = 255  # no object
    pred = torch.zeros_like(label)
    pred[2, 2:4] = 1
    pred[10, 10:13] = pred[11, 10] = 1
    metric = SmallObjects(4, below_px=10)
    metric.update(pred, label)
    assert metric.counts.tolist() == [[0, 2, 1, 0], [0, 1, 0, 0]]
    assert metric.recall()[1:3].tolist() == [0.5, 0]
    assert metric.recall()[[0, 3]].isnan().all()
    metric = SmallObjects(4, below_px=9)  # 9 px are not below 9 px
    metric.update(pred, label)
    assert metric.counts[0].tolist() == [0, 1, 1, 0]
