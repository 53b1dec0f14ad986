"""What a run fetched is in its record, over all starts."""

import json

from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.train import train
from tests.data.faulty_server import Fault, FaultyServer


def test_figures_reach_the_record(shapes, make_recipe, tmp_path):
    names = [shard.file for shard in ShardIndex.load(shapes).streams["labelled"].shards]
    with FaultyServer(shapes, {names[0]: Fault(times=1, status=503)}) as server:
        recipe = make_recipe(
            data={"root": server.url, "cache_dir": str(tmp_path / "cache"), "workers": 1},
            run={"steps": 12, "evaluate_every": 0, "checkpoint_every": 6},
        )
        run = train(recipe)
        summary = json.loads((run / "summary.json").read_text())
        sent = [request for request in server.requests if request.sent and request.path.endswith(".tar")]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of_steps = [record.get("fetched", {}) for record in records if record["kind"] == "train"]
    total = {name: sum(step.get(name, 0) for step in of_steps) for name in ("shards", "failed_tries")}
    assert total["failed_tries"] == 1
    # Of the last batches' shards some may have come after them, for the evaluation at the end.
    assert 0 < total["shards"] <= len(sent)
    assert {name: summary["fetched"][name] for name in total} == total
    assert summary["fetched"]["bytes"] > 0
    assert summary["fetched"]["seconds"] > 0


def test_a_run_from_a_folder_has_no_such_figures(make_recipe):
    run = train(make_recipe())
    assert "fetched" not in (run / "metrics.jsonl").read_text()
    assert "fetched" not in json.loads((run / "summary.json").read_text())
