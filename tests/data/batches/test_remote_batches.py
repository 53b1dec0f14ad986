"""Training from a real HTTP server: the same batches as from a folder, whatever goes wrong on the way."""

import json

import pytest

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.shards import range_reads
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.train import train
from tests.data.batches.common import same
from tests.data.faulty_server import Fault, FaultyServer
from tests.data.remote.common import wait_until


def over(server, tmp_path, cache="cache", **more):
    """The data section that reads from a server, by a small patience."""
    patience = {"fetch_timeout_s": 1.0, "fetch_attempts": 5}
    return {"root": server.url, "cache_dir": str(tmp_path / cache), **patience, **more}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_a_folder(shapes, make_recipe, tmp_path, workers):
    plain = list(load_batches(TrainingBatches(make_recipe(), 3, 0, 1, unlabelled=True), 0, 6))
    names = [shard.file for stream in ShardIndex.load(shapes).streams.values() for shard in stream.shards]
    faults = {
        names[0]: [Fault(times=2, status=503)],
        names[1]: [Fault(times=1, cut_after=900)],
        names[2]: [Fault(times=1, wrong_bytes=True)],
        "index.json": [Fault(times=1, status=500)],
    }
    with FaultyServer(shapes, faults) as server:
        recipe = make_recipe(data=over(server, tmp_path, workers=workers), run={"steps": 6})
        fetched = list(load_batches(TrainingBatches(recipe, 3, 0, 1, unlabelled=True), 0, 6))
    assert all(map(same, plain, fetched))
    assert not any(batch.skipped for batch in fetched)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 5, 4096])
def test_ranks_with_caches_of_their_own_read_an_epoch_of_bytes_between_them(
    shapes, make_recipe, tmp_path, world_size, window
):
    total = int(ShardIndex.load(shapes).streams["unlabelled"].shards.bytes.sum())
    steps = 24 // world_size
    with FaultyServer(shapes) as server:
        for rank in range(world_size):
            data = over(server, tmp_path, f"cache-{rank}", shuffle_window=window, labelled_count=0)
            recipe = make_recipe(
                data=data,
                engine={"micro_batch": 1},
                run={"steps": steps},
                model={"backbone": "transformers/segformer-b0", "pretrained": "x"},
            )
            made = TrainingBatches(recipe, 3, rank, world_size, unlabelled=True)
            for number in range(steps):
                made[number]
        sent = sum(request.sent for request in server.requests if request.path.endswith(".tar"))
    assert sent == total


def test_a_shard_that_never_comes_is_skipped_and_counted(shapes, make_recipe, tmp_path):
    lost = ShardIndex.load(shapes).streams["unlabelled"].shards[2]
    with FaultyServer(shapes, {lost.file: Fault(status=404)}) as server:
        # 12 steps of two images are an epoch, in which the lost shard's samples are met once each, or stand in.
        recipe = make_recipe(data=over(server, tmp_path), run={"steps": 12, "evaluate_every": 0})
        run = train(recipe)
        tries = [request for request in server.requests if request.path == lost.file]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    skipped = sum(record.get("skipped", {}).get("shard_unreadable", 0) for record in records)
    assert skipped >= lost.samples
    listed = [json.loads(line) for line in (run / "skipped" / "rank-0.jsonl").read_text().splitlines()]
    assert len(listed) == skipped
    assert {(entry["shard"], entry["reason"], entry["key"]) for entry in listed} == {
        (lost.file, "shard_unreadable", None)
    }
    assert len(tries) <= 2  # asked for in the background and when it was due, and not again for each of its samples


def test_an_index_that_is_not_there(shapes, make_recipe, tmp_path):
    with FaultyServer(tmp_path) as server:
        data = replace_section(make_recipe().data, over(server, tmp_path))
        with pytest.raises(ValueError, match=r"index\.json"):
            load_index(server.url, data)


def replace_section(section, values):
    return section.model_copy(update=values)


def test_shards_of_an_index_may_lie_anywhere(shapes, make_recipe, tmp_path):
    """A local index of shards on a server."""
    with FaultyServer(shapes) as server:
        content = json.loads((shapes / "index.json").read_text())
        for shard in content["streams"]["unlabelled"]["shards"]:
            shard["file"] = f"{server.url}/{shard['file']}"
        for name in ("labelled", "dev", "val"):
            for shard in content["streams"][name]["shards"]:
                shard["file"] = str(shapes / shard["file"])
        (tmp_path / "index.json").write_text(json.dumps(content))
        data = over(server, tmp_path) | {"root": str(tmp_path)}
        fetched = TrainingBatches(make_recipe(data=data), 3, 0, 1, unlabelled=True)[0]
    assert same(fetched, TrainingBatches(make_recipe(), 3, 0, 1, unlabelled=True)[0])


def test_an_index_is_fetched_once_by_a_run_and_all_its_evaluations(shapes, make_recipe, tmp_path):
    """And again by the next run, for which it may have been written anew."""
    with FaultyServer(shapes) as server:
        for runs in (1, 2):
            run = {"dir": str(tmp_path / f"run-{runs}"), "steps": 3, "evaluate_every": 1}
            train(make_recipe(data=over(server, tmp_path), run=run))
            assert server.gets("index.json") == runs


def test_the_first_unlabelled_shards_come_during_the_burn_in(shapes, make_recipe, tmp_path):
    with FaultyServer(shapes) as server:
        recipe = make_recipe(
            data=over(server, tmp_path, labelled=[{"root": str(shapes)}], shuffle_window=6),
            method={"burn_in": 0.5},
            run={"steps": 12},
        )
        made = TrainingBatches(recipe, 3, 0, 1, unlabelled=True)
        (source,) = made.unlabelled.sources
        order = source.order(0, 1)
        window = order.window_of(0)
        first = {source.stream.shards.file(shard) for shard in order.shards_of(*window)}
        cache = source.stream.cache
        made[1]
        assert server.gets() == 1  # only the index: half a window before its first step is soon enough
        for number in range(2, 6):
            made[number]
            wait_until(lambda: not cache._here().prefetching)
        asked = {request.path for request in server.requests} - {"index.json"}
        assert asked == first
        before = server.gets()
        made[6]
        wait_until(lambda: not cache._here().prefetching)
        assert not first & {request.path for request in server.requests[before:]}


def test_shards_of_half_a_window_later_are_fetched(shapes, make_recipe, tmp_path):
    """As docs/streaming.md says: not a whole window later, for which a small cache may have no room."""
    with FaultyServer(shapes) as server:
        data = over(server, tmp_path, labelled=[{"root": str(shapes)}], shuffle_window=12)
        made = TrainingBatches(
            make_recipe(data=data, method={"burn_in": 0}, run={"steps": 12}), 3, 0, 1, unlabelled=True
        )
        (source,) = made.unlabelled.sources
        order = source.order(0, 1)
        windows = [
            {source.stream.shards.file(shard) for shard in order.shards_of(start, start + 12)} for start in (0, 12)
        ]
        for number in range(6):  # two images each: half a window is three steps
            made[number]
            wait_until(lambda: not source.stream.cache._here().prefetching)
            second = {request.path for request in server.requests} & (windows[1] - windows[0])
            assert bool(second) == (number >= 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_batches_come_before_their_shards(shapes, make_recipe, tmp_path, workers, monkeypatch):
    """Of a new run and of one that continues; they are those of a folder."""
    monkeypatch.setattr(range_reads, "_SHARE", 0.1)  # these shards have few samples, which come again and again
    plain = list(load_batches(TrainingBatches(make_recipe(), 3, 0, 1, unlabelled=True), 0, 6))
    names = [shard.file for stream in ShardIndex.load(shapes).streams.values() for shard in stream.shards]
    with FaultyServer(shapes, {name: Fault(of="whole", stall_after=0) for name in names}) as server:
        for start in (0, 3):
            data = over(server, tmp_path, f"cache-{start}", workers=workers, fetch_timeout_s=10.0, fetch_attempts=1)
            made = TrainingBatches(make_recipe(data=data, run={"steps": 6}), 3, 0, 1, unlabelled=True)
            fetched = list(load_batches(made, start, 6))
            assert all(map(same, plain[start:], fetched))
            assert [batch.fetched.ranges for batch in fetched] == [4] * len(fetched)
            assert not any(batch.skipped for batch in fetched)
