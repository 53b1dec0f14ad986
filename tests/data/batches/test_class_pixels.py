"""Pixels of each class are those of the samples that a run may use."""

import json
import shutil

import pytest
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


def with_pixels(shapes, tmp_path, pixels):
    root = shutil.copytree(shapes, tmp_path / "shapes")
    content = json.loads((root / "index.json").read_text())
    content["streams"]["labelled"]["class_pixels"] = pixels
    (root / "index.json").write_text(json.dumps(content))
    return str(root)


CLASSES = ("ground", "square", "disc")
NO_DISC = "labelled samples: no pixel of class 'disc'"
IGNORED = "labelled samples: 75.0% of the pixels are ignored"


@pytest.mark.parametrize(
    ("pixels", "data", "said"),
    [
        ([5, 5, 5, 15], {}, []),
        ([5, 5, 0, 30], {}, [NO_DISC, IGNORED]),
        ([5, 5, 0, 30], {"labelled_count": 2}, [NO_DISC]),  # of the others it is not known
        ([5, 5, 0, 30], {"labelled": [{"shards": "0-2"}]}, []),
        (None, {}, []),
        ([5, 5, 0], {}, []),  # of other classes than the index has
    ],
)
def test_what_the_index_says_is_warned_of(make_recipe, shapes, tmp_path, pixels, data, said):
    root = with_pixels(shapes, tmp_path, pixels)
    data = {"root": root} | data
    if "labelled" in data:
        data["labelled"] = [{"root": root, **source} for source in data["labelled"]]
    assert make_batches(make_recipe, data=data).label_warnings(CLASSES) == said


def test_counted_pixels_are_those_that_are_warned_of(make_recipe, shapes, tmp_path):
    batches = make_batches(make_recipe, data={"root": with_pixels(shapes, tmp_path, [5, 5, 0, 30])})
    assert batches.label_warnings(CLASSES) == [NO_DISC, IGNORED]
    batches.class_pixels()
    assert batches.label_warnings(CLASSES) == []
