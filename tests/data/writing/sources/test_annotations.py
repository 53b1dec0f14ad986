"""Annotations drawn as label maps, compared with pycocotools, and run lengths that are none."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.writing.sources.annotations import AnnotationRule, Region, pack, run_lengths

coco = pytest.importorskip("pycocotools.mask")

RULE = pickle.loads(pickle.dumps(AnnotationRule()))
MASKS = st.tuples(st.integers(1, 24), st.integers(1, 24)).flatmap(lambda size: arrays(np.bool_, size))
OUTLINES = st.lists(st.lists(st.floats(-30, 60, width=32), min_size=6, max_size=16).map(lambda p: p[: len(p) // 2 * 2]))


def drawn(size, *regions, rest=0):
    return RULE.read(pack(size, rest, regions).encode(), "a.jpg")


def plain(mask):
    """Run lengths as a list."""
    pixels = mask.T.ravel()
    edges = np.concatenate([[0], np.flatnonzero(np.diff(pixels)) + 1, [pixels.size]])
    return [0] * bool(pixels[0]) + np.diff(edges).tolist()


@given(MASKS)
def test_run_lengths_of_both_kinds(mask):
    compressed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    for counts in (compressed, plain(mask)):
        shape = {"size": list(mask.shape), "counts": counts}
        assert (drawn(mask.shape, Region(1, shape, "1")) == mask).all()


@given(OUTLINES, st.integers(1, 30), st.integers(1, 30))
def test_outlines_are_drawn_as_pycocotools_draws_them(outlines, height, width):
    expected = np.zeros((height, width))
    if outlines:
        expected = coco.decode(coco.merge(coco.frPyObjects(outlines, height, width)))
    assert (drawn((height, width), Region(1, outlines, "1")) == expected).all()


@given(st.one_of(st.text(max_size=12), st.lists(st.integers(-20, 1 << 70), max_size=6), st.none(), st.floats()))
def test_what_are_no_run_lengths_is_one_line(counts):
    try:
        right = int(run_lengths(counts).sum()) == 16 and run_lengths(counts).min() >= 0
    except (ValueError, OverflowError):
        right = False
    region = Region(1, {"size": [4, 4], "counts": counts}, "annotation 7")
    if not right:
        with pytest.raises(BadSample, match=r"a\.jpg: annotation 7: its run lengths"):
            drawn((4, 4), region)
    else:
        assert drawn((4, 4), region).shape == (4, 4)


def test_run_lengths_of_another_size():
    with pytest.raises(BadSample, match=r"run lengths are of \[2, 8\]"):
        drawn((4, 4), Region(1, {"size": [2, 8], "counts": [16]}, "7"))


def box(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def test_the_smaller_region_is_on_top_and_of_equal_ones_the_later():
    small, large = Region(1, box(2, 0, 2, 4), "1"), Region(2, box(0, 0, 8, 4), "2")
    assert (drawn((4, 8), small, large) == drawn((4, 8), large, small)).all()
    assert drawn((4, 8), small, large)[0].tolist() == [2, 2, 1, 1, 2, 2, 2, 2]
    assert drawn((4, 8), Region(1, box(0, 0, 4, 4), "1"), Region(2, box(2, 0, 4, 4), "2"))[0].tolist() == [
        *(1, 1, 2, 2, 2, 2, 0, 0)
    ]


def test_what_is_below_is_below_however_small_it_is():
    crowd, large = Region(255, box(3, 0, 2, 4), "1", below=True), Region(2, box(0, 0, 4, 4), "2")
    assert drawn((4, 6), large, crowd, rest=1)[0].tolist() == [2, 2, 2, 2, 255, 1]
