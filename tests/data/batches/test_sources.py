"""Which sources and which of their samples a run uses, and which are refused."""

from collections import Counter

import pytest

from maskmatch_scale.data.batches.sources import draw_labelled
from maskmatch_scale.data.faults import DataError
from tests.conftest import ShapesSource, write_shards
from tests.data.batches.common import make_batches


def test_sources_that_do_not_fit(make_recipe, shapes, tmp_path):
    other = ShapesSource({"labelled": 3}, classes=("x", "y", "z"))
    write_shards(other, tmp_path / "o", workers=1, progress=False)
    with pytest.raises(DataError, match="its classes or its ignore_index are not those of"):
        make_batches(make_recipe, data={"labelled": [{"root": str(tmp_path / "o")}]})
    with pytest.raises(DataError, match=r"data\.unlabelled: two sources are called 'unlabelled'"):
        make_batches(make_recipe, data={"unlabelled": [{"root": str(shapes)}, {"root": str(shapes)}]})


def test_a_labelled_stream_serves_as_unlabelled(make_recipe, shapes):
    data = {"unlabelled": [{"root": str(shapes), "stream": "labelled", "name": "again"}]}
    assert len(make_batches(make_recipe, data=data)[0].unlabelled_images) == 2


def test_labelled_draw():
    draws = {tuple(draw_labelled([8], 3, seed)[0].tolist()) for seed in range(6)}
    assert len(draws) > 1
    assert all(len(set(draw)) == 3 and max(draw) < 8 for draw in draws)
    assert draw_labelled([8, 5], None, 0) == [None, None]
    both = [part.tolist() for part in draw_labelled([8, 5], 6, 1)]
    assert sum(map(len, both)) == 6
    assert max(both[1]) < 5
    with pytest.raises(DataError, match=r"data\.labelled_count=9: there are 8"):
        draw_labelled([8], 9, 0)


def test_only_drawn_samples_are_ever_shown(make_recipe):
    few = make_batches(make_recipe, data={"labelled_count": 2}, engine={"micro_batch": 4})
    (source,) = few.labelled.sources
    places = [place for number in range(30) for _, place in few.places(few.labelled, number)]
    starts = source.stream.shards.starts
    numbers = Counter(int(starts[shard]) + within for shard, within in map(source.locate, places))
    assert numbers == dict.fromkeys(source.numbers.tolist(), 60)


def test_lanes_that_do_not_divide_the_batch(make_recipe):
    with pytest.raises(DataError, match=r"data\.lanes=3 does not divide the 4 images that 2 ranks take"):
        make_batches(make_recipe, 0, 2, data={"lanes": 3})
