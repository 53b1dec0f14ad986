"""Pixels of each class are those of the samples that a run may use."""

import torch

from maskmatch_scale.data.batches.views import label_map
from maskmatch_scale.method.maskmatch import class_weights
from tests.data.batches.common import make_batches


def test_class_pixels_count_the_drawn_samples_alone(make_recipe, shapes):
    few = make_batches(make_recipe, data={"labelled_count": 2})
    (source,) = few.labelled.sources
    labels = [label_map(source.stream[number], 3, 255) for number in source.numbers.tolist()]
    total = sum(torch.bincount(label.flatten().long(), minlength=256)[:3] for label in labels)
    assert few.class_pixels().equal(total)
    weights = class_weights(few.class_pixels())
    assert torch.isclose((weights * total / total.sum()).sum(), torch.tensor(1.0))
