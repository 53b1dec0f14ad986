import torch
from hypothesis import given
from hypothesis import strategies as st

from maskmatch_scale.evaluation.evaluate import Window, evaluate_split
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.evaluation.sliding import forwards_of, sliding_probabilities, window_starts
from maskmatch_scale.recipe import DataRecipe, EvaluationRecipe


@given(side=st.integers(1, 500), window=st.integers(1, 200), overlap=st.floats(0, 0.9))
def test_windows_cover_every_pixel_and_overlap_enough(side, window, overlap):
    starts = window_starts(side, window, overlap)
    assert starts[0] == 0
    assert starts == sorted(starts)
    if side > window:
        assert starts[-1] == side - window
        steps = [b - a for a, b in zip(starts, starts[1:])]
        assert max(steps) <= window * (1 - overlap) + 1


def pointwise(images):
    """A segmenter whose prediction of a pixel looks at that pixel alone: windows cannot matter."""
    return torch.cat([images[:, :2] * 3, images[:, :1] - images[:, 1:2]], 1)


def test_windows_change_nothing_for_a_pointwise_model():
    image = torch.randn(3, 70, 45)
    calls = []
    scores = sliding_probabilities(lambda x: calls.append(1) or pointwise(x), image, (32, 40), 0.3, batch=2)
    torch.testing.assert_close(scores, pointwise(image[None])[0].softmax(0))
    assert len(calls) == forwards_of((70, 45), (32, 40), 0.3, 2)


def test_an_image_smaller_than_a_window():
    image = torch.randn(3, 20, 50)
    scores = sliding_probabilities(pointwise, image, (32, 32), 0.25, batch=8)
    torch.testing.assert_close(scores, pointwise(image[None])[0].softmax(0))


def test_ranks_together_give_the_matrix_of_one(shapes):
    window = Window((64, 64), EvaluationRecipe(), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), torch.device("cpu"))
    whole = ConfusionMatrix(3)
    assert evaluate_split(pointwise, DataRecipe(root=str(shapes)), "val", window, whole) == 5
    parts = []
    for rank in range(2):
        parts.append(ConfusionMatrix(3))
        evaluate_split(pointwise, DataRecipe(root=str(shapes)), "val", window, parts[-1], (rank, 2))
    assert (parts[0].counts + parts[1].counts).equal(whole.counts)
