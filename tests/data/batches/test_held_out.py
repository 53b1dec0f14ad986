"""Each image counts once; who decodes it changes nothing."""

import multiprocessing

import pytest

from maskmatch_scale.data.batches import held_out
from maskmatch_scale.data.batches.held_out import evaluation_samples
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.index import ShardIndex
from tests.conftest import ShapesSource, rewrite_shard, write_shards


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_shows_each_sample_once(make_recipe, world_size):
    data = make_recipe().data
    ranks = [[s.key for s in evaluation_samples(data, "val", rank, world_size)] for rank in range(world_size)]
    assert sorted(key for keys in ranks for key in keys) == [f"val-{number:04d}" for number in range(5)]
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    with pytest.raises(DataError, match="no labels"):
        list(evaluation_samples(data, "unlabelled"))


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_decode_the_same_in_the_same_order(make_recipe, workers):
    data = make_recipe().data
    here = list(evaluation_samples(data, "val"))
    there = list(evaluation_samples(data, "val", workers=workers))
    assert [s.number for s in there] == [s.number for s in here] == list(range(5))
    for one, other in zip(here, there, strict=True):
        assert (one.key, one.image.tolist(), one.label.tolist()) == (
            other.key,
            other.image.tolist(),
            other.label.tolist(),
        )


def test_processes_decode_a_few_samples_ahead_and_end_with_the_generator(tmp_path, make_recipe, monkeypatch):
    write_shards(ShapesSource({"labelled": 2, "unlabelled": 2, "val": 30}), tmp_path, workers=1, progress=False)
    data = make_recipe(data={"root": str(tmp_path)}).data
    decoded = multiprocessing.get_context("fork").Value("i", 0)
    plain = held_out.decode_label

    def counted(*arguments, **options):
        with decoded.get_lock():
            decoded.value += 1
        return plain(*arguments, **options)

    monkeypatch.setattr(held_out, "decode_label", counted)
    before = set(multiprocessing.active_children())
    samples = evaluation_samples(data, "val", workers=2)
    for _ in range(3):
        next(samples)
    assert len(set(multiprocessing.active_children()) - before) == 2
    samples.close()
    assert set(multiprocessing.active_children()) <= before
    assert 3 <= decoded.value <= 3 + 2 * 2 + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_one_line_in_its_turn(tmp_path, make_recipe, workers):
    write_shards(ShapesSource({"labelled": 2, "unlabelled": 2, "val": 5}), tmp_path, workers=1, progress=False)
    data = make_recipe(data={"root": str(tmp_path)}).data
    shards = ShardIndex.load(tmp_path).streams["val"].shards
    shard = shards.file(shards.locate(3)[0])
    rewrite_shard(tmp_path, shard, {"val-0003.webp": b"no image"})
    before = set(multiprocessing.active_children())
    samples = evaluation_samples(data, "val", workers=workers)
    assert [next(samples).number for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=rf"^{shard}: val-0003: not a readable image") as caught:
        next(samples)
    assert "\n" not in str(caught.value)
    del caught
    assert set(multiprocessing.active_children()) <= before
