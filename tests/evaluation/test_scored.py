"""What is said of the classes that a mean IoU is a mean of."""

import pytest
import torch

from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.evaluation.scored import mean_warnings, scored_classes

CLASSES = ("ground", "crack", "plant")


@pytest.mark.parametrize(
    ("labels", "predicted", "in_mean", "without", "said"),
    [
        ([0, 1, 2], [0, 0, 0], 3, [], []),
        ([0, 1, 1], [0, 1, 2], 3, ["plant"], ["dev: no pixel of class 'plant'; its IoU says nothing"]),
        ([0, 0, 255], [0, 1, 2], 2, ["crack", "plant"],
         ["dev: no pixel of classes 'crack', 'plant'; their IoU says nothing"]),
        ([0, 0, 255], [0, 0, 2], 1, ["crack", "plant"],
         ["dev: no pixel of classes 'crack', 'plant'; their IoU says nothing",
          "dev: labels and predictions have one class alone; its mean IoU of 1 says nothing"]),
    ],
)  # fmt: skip
def test_classes_without_pixels_are_named(labels, predicted, in_mean, without, said):
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor(predicted), torch.tensor(labels))
    found = scored_classes(matrix, CLASSES)
    assert found == {"classes": 3, "classes_in_mean": in_mean, "classes_without_pixels": without}
    assert mean_warnings({"split": "dev", **found}) == said


def test_classes_without_names_are_numbered():
    assert scored_classes(ConfusionMatrix(3), ("ground",)) == {
        "classes": 3,
        "classes_in_mean": 0,
        "classes_without_pixels": ["ground", "class 1", "class 2"],
    }
