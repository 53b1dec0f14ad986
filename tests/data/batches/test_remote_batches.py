"""Training from a real HTTP server: the same batches as from a folder, whatever goes wrong on the way."""

import json

import pytest

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import load_index
from maskmatch_scale.train import train
from tests.data.batches.common import same
from tests.data.faulty_server import Fault, FaultyServer


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
