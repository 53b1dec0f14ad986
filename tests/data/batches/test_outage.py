"""The network is lost for good: the run goes on with what is on this machine until it has written a checkpoint."""

import json

import pytest

from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.errors import TrainingStopped
from maskmatch_scale.recipe import RecipeError
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback
from tests.data.batches.common import make_batches
from tests.data.faulty_server import Fault, FaultyServer

STEPS = 60
"""Longer than the time after which the network counts as lost."""
HANGS, REFUSES = Fault(stall_after=0), Fault(status=503)


@pytest.fixture
def server(shapes):
    with FaultyServer(shapes) as running:
        yield running


def losing(server, fault, step):
    """A callback after whose step nothing new comes from the server."""

    class Loses(Callback):
        def after_step(self, done, figures):
            if done == step:
                server._faults["*"] = [fault]

    return Loses


@pytest.mark.parametrize(
    ("fault", "lost", "workers"),
    [(HANGS, "unlabelled", 0), (REFUSES, "unlabelled", 1), (REFUSES, "labelled", 0)],
)
def test_a_run_stops_with_a_checkpoint_and_goes_on_later(server, shapes, make_recipe, tmp_path, fault, lost, workers):
    """By the default settings a server that hangs would be waited for two hours: eight tries for each of 15 shards."""
    remote, local = [{"root": server.url}], [{"root": str(shapes)}]
    recipe = make_recipe(
        data={
            "labelled": remote if lost == "labelled" else local,
            "unlabelled": remote if lost == "unlabelled" else local,
            "cache_dir": str(tmp_path / "cache"),
            "shuffle_window": 3,
            "workers": workers,
            "outage_s": 0.5,
            "max_bad_share": 1.0,
        },
        method={"burn_in": 0},
        run={"steps": STEPS, "log_every": 2, "checkpoint_every": 0, "evaluate_every": 0},
    )
    with pytest.raises(TrainingStopped, match=r"could be fetched for data\.outage_s=0\.5 s.*--resume auto"):
        train(recipe, callbacks=[losing(server, fault, 1)])
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert checkpoint.name == f"step-{records[-1]['step']:08d}"
    assert records[-1]["step"] < STEPS
    assert all(record["loss"] is not None for record in records if record["kind"] == "train")
    listed = [json.loads(line) for line in (run / "skipped" / "rank-0.jsonl").read_text().splitlines()]
    assert "unreachable" in {skip["reason"] for skip in listed}
    assert {skip["source"] for skip in listed} == {lost}
    server._faults.clear()
    # In another cache: threads of the first run, which end with its process, are still trying.
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache_dir": str(tmp_path / "other")})})
    assert train(other, "auto") == run
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, STEPS + 1))


def test_one_dead_shard_is_no_outage(server, shapes, make_recipe, tmp_path):
    """It is given up after half of the time; a replacement from elsewhere comes, and the run goes on."""
    dead = ShardIndex.load(shapes).streams["unlabelled"].shards[2]
    server._faults[dead.file] = [HANGS]
    data = {"root": server.url, "cache_dir": str(tmp_path / "cache"), "shuffle_window": 3, "outage_s": 1.0}
    made = make_batches(make_recipe, data=data, method={"burn_in": 0}, run={"steps": 12})
    skipped = [skip for number in range(12) for skip in made[number].skipped]
    assert {(skip.shard, skip.reason) for skip in skipped} == {(dead.file, "shard_unreadable")}


def test_what_comes_in_the_background_ends_the_outage(server, shapes, make_recipe, tmp_path):
    data = {
        "unlabelled": [{"root": server.url}],
        "cache_dir": str(tmp_path / "cache"),
        "shuffle_window": 3,
        "outage_s": 0.2,
    }
    made = make_batches(make_recipe, data=data, method={"burn_in": 0}, run={"steps": 12})
    made[0]
    server._faults["*"] = [REFUSES]
    lost = [skip.reason for number in range(1, 12) for skip in made[number].skipped]
    assert "unreachable" in lost
    server._faults.clear()
    for source in made.unlabelled.sources:
        for shard in range(len(source.stream.shards)):
            source.stream.cache.fetch(
                source.stream.location(shard),
                int(source.stream.shards.bytes[shard]),
                source.stream.shards.sha256(shard),
            )
    assert not [skip for number in range(12) for skip in made[number].skipped]


def test_a_limit_that_the_other_ranks_do_not_wait_for(make_recipe):
    with pytest.raises(RecipeError, match=r"data\.outage_s=20.*collective_timeout_s=30"):
        make_recipe(data={"outage_s": 20.0}, engine={"collective_timeout_s": 30})
    assert make_recipe(data={"outage_s": 15.0}, engine={"collective_timeout_s": 30})


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_whose_images_do_not_come_is_made_up_for_later(server, shapes, make_recipe, tmp_path, workers):
    """Labelled and unlabelled images are here, `dev` is on the server."""
    sources = [{"root": str(shapes)}]
    recipe = make_recipe(
        data={
            "root": server.url,
            "labelled": sources,
            "unlabelled": sources,
            "cache_dir": str(tmp_path / "cache"),
            "workers": workers,
            "outage_s": 0.5,
        },
        method={"burn_in": 0},
        run={"steps": 4, "checkpoint_every": 0, "evaluate_every": 2},
    )
    with pytest.raises(TrainingStopped, match=r"step 2: the evaluation cannot go on: .*dev.*--resume auto"):
        train(recipe, callbacks=[losing(server, HANGS, 1)])
    run = tmp_path / "run"
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert checkpoint.name == "step-00000002"
    server._faults.clear()
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache_dir": str(tmp_path / "other")})})
    train(other, "auto")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [(record["step"], record["weights"]) for record in records if record["kind"] == "eval"]
    assert evaluated == [(2, "ema"), (4, "ema"), (4, "student")]
