"""Pixels of each class, and what is said of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.encode import encode_label
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.label_pixels import index_warnings, known_pixels, pixel_warnings, pixels_of, sum_of

CLASSES = ("ground", "crack", "plant")
MAPS = arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 1, 2, 7]))


@given(MAPS)
def test_every_pixel_counts_once(values):
    pixels = pixels_of(encode_label(values), "x", 3, 7)
    assert pixels == tuple(int((values == value).sum()) for value in (0, 1, 2, 7))
    assert sum(pixels) == values.size


def test_a_value_that_is_no_class_is_named():
    with pytest.raises(BadSample, match="x: label value 3, but there are 3 classes"):
        pixels_of(encode_label(np.full((2, 2), 3, np.uint8)), "x", 3, 255)


def test_a_sum_is_known_only_if_all_of_it_is():
    assert sum_of([(1, 2, 3), (10, 20, 30)]) == (11, 22, 33)
    assert sum_of([(1, 2, 3), None]) is None
    assert sum_of([]) is None


@pytest.mark.parametrize(
    ("pixels", "lines"),
    [
        ((50, 1, 1, 52), []),
        ((50, 1, 0, 51), ["x: no pixel of class 'plant'"]),
        ((50, 0, 0, 50), ["x: no pixel of classes 'crack', 'plant'"]),
        ((20, 10, 10, 60), ["x: 60.0% of the pixels are ignored"]),
        ((0, 1, 1, 998), ["x: no pixel of class 'ground'", "x: 99.8% of the pixels are ignored"]),
        ((0, 0, 0, 0), ["x: no pixel of classes 'ground', 'crack', 'plant'"]),
    ],
)
def test_what_is_warned_of(pixels, lines):
    assert pixel_warnings("x", pixels, CLASSES) == lines
    assert pixel_warnings("x", pixels, CLASSES, ignored=False) == lines[: len(lines) - ("ignored" in str(lines))]


def test_many_classes_are_not_all_named():
    names = [f"c{number}" for number in range(171)]
    (line,) = pixel_warnings("x", [1] + [0] * 171, names)
    assert line == "x: no pixel of classes 'c1', 'c2', 'c3', 'c4', 'c5' and 165 more"


def test_an_index_that_says_nothing_is_not_warned_of():
    shard = {"file": "a.tar", "samples": 1}
    streams = {
        "labelled": {"labelled": True, "shards": [shard], "class_pixels": [5, 0, 2, 1]},
        "val": {"labelled": True, "shards": [shard]},
        "unlabelled": {"labelled": False, "shards": [shard]},
        "old": {"labelled": True, "shards": [shard], "class_pixels": [5, 0]},
    }
    content = {"source": "x", "classes": CLASSES, "palette": [[0, 0, 0]] * 3, "streams": streams}
    index = ShardIndex.model_validate(content)
    assert known_pixels(index) == {"labelled": (5, 0, 2, 1)}
    assert index_warnings(index) == ["stream 'labelled': no pixel of class 'crack'"]
    again = ShardIndex.parse(index.to_json(), "x")
    assert again == index
    more = ShardIndex.model_validate(content | {"streams": {"labelled": streams["labelled"] | {"shards": [shard] * 2}}})
    assert more.with_shards("labelled", [0]).streams["labelled"].class_pixels is None
