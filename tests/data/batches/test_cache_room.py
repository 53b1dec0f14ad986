"""What a run says of its cache when it starts."""

import re

import pytest

from maskmatch_scale.data.batches.cache_room import cache_lines
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.train import train
from tests.data.faulty_server import FaultyServer


def simulated(shards=1000, samples=1000, size=100_000_000):
    entries = [{"file": f"{n:06d}.tar", "samples": samples, "bytes": size} for n in range(shards)]
    streams = {"unlabelled": {"labelled": False, "shards": entries}}
    return ShardIndex.model_validate({"source": "simulated", "streams": streams})


def lines_of(make_recipe, tmp_path, *, world_size=1, local_ranks=1, index=None, **data):
    data = {"root": "https://example.org/x", "cache_dir": str(tmp_path / "cache"), "labelled_count": 0, **data}
    recipe = make_recipe(
        data=data,
        model={"backbone": "transformers/segformer-b0", "pretrained": "x"},
        method={"burn_in": 0},
    )
    made = TrainingBatches(recipe, 3, 0, world_size, unlabelled=True, index=index or simulated())
    return cache_lines(made, local_ranks)


def test_nothing_is_said_of_local_shards(make_recipe):
    assert cache_lines(TrainingBatches(make_recipe(), 3, 0, 1, unlabelled=True), 1) == []


def test_where_it_is(make_recipe, tmp_path):
    (line,) = lines_of(make_recipe, tmp_path)
    assert re.fullmatch(rf"fetched shards are kept in {tmp_path}/cache( \([\w., ]+\))?, up to 50 GB", line)


@pytest.mark.parametrize(
    ("world_size", "local_ranks", "lanes", "shards"),
    [(1, 1, None, 9), (8, 8, None, 72), (64, 8, None, 72), (8, 8, 2, 18), (8, 4, 1, 9), (64, 8, 16, 18)],
)
def test_shards_of_two_windows_of_each_lane_need_room(make_recipe, tmp_path, world_size, local_ranks, lanes, shards):
    """A window of 4000 samples has four shards of 1000, and two windows one more, which begins in the one before."""
    ranks = {"world_size": world_size, "local_ranks": local_ranks, "lanes": lanes, "shuffle_window": 4000}
    needed = shards * 0.1
    assert len(lines_of(make_recipe, tmp_path, cache_gb=needed * 1.001, **ranks)) == 1
    _, warning = lines_of(make_recipe, tmp_path, cache_gb=needed * 0.999, **ranks)
    assert warning.startswith("warning: data.cache_gb=")
    enough = re.search(r"set data\.cache_gb=([\d.]+)", warning)
    assert needed <= float(enough[1]) <= needed * 1.1
    assert len(lines_of(make_recipe, tmp_path, cache_gb=float(enough[1]), **ranks)) == 1


def test_never_more_than_there_is(make_recipe, tmp_path):
    few = simulated(shards=5, size=1_000_000_000)
    assert len(lines_of(make_recipe, tmp_path, index=few, cache_gb=5.0)) == 1
    assert len(lines_of(make_recipe, tmp_path, index=few, cache_gb=4.9)) == 2


def test_sizes_that_nobody_knows(make_recipe, tmp_path):
    assert len(lines_of(make_recipe, tmp_path, index=simulated(size=None), cache_gb=0.001)) == 1


def test_a_run_says_it(shapes, make_recipe, tmp_path, capsys):
    with FaultyServer(shapes) as server:
        data = {"root": server.url, "cache_dir": str(tmp_path / "cache"), "cache_gb": 0.0002}
        run = train(make_recipe(data=data, run={"steps": 1, "evaluate_every": 0}))
    log = (run / "log/rank-0.txt").read_text()
    assert f"fetched shards are kept in {tmp_path}/cache" in log
    assert "warning: data.cache_gb=0.0002 is too small" in log
    assert "fetched shards are kept in" in capsys.readouterr().out
