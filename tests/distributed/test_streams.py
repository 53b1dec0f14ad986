"""Two ranks that stream from a server: faults, bad samples, a stop, other batches, and a run without labels."""

import json
import shutil
from collections import Counter

import pytest

from maskmatch_scale.data.shards.index import ShardIndex
from tests.conftest import ShapesSource, recipe_maker, rewrite_shard, write_shards
from tests.data.faulty_server import Fault, FaultyServer
from tests.distributed.launching import launch, records

pytestmark = pytest.mark.distributed

STEPS = 6


@pytest.fixture(scope="module")
def server(shapes, tmp_path_factory):
    """Shards of which two unlabelled samples are bad, and an archive that never had labels."""
    root = tmp_path_factory.mktemp("served")
    shutil.copytree(shapes, root / "shapes")
    archive = ShapesSource({"unlabelled": 11}, name="archive", classes=(), palette=())
    write_shards(archive, root / "archive", workers=1, progress=False)
    shards = ShardIndex.load(shapes).streams["unlabelled"].shards
    for number in (2, 13):
        shard = int(shards.starts.searchsorted(number, side="right")) - 1
        rewrite_shard(root / "shapes", shards.file(shard), {f"unlabelled-{number:04d}.webp": b"rubbish"})
    faults = {
        f"shapes/{shards.file(0)}": [Fault(times=1, status=503)],
        f"shapes/{shards.file(1)}": [Fault(times=1, cut_after=2000)],
        "archive/unlabelled-000001.tar": [Fault(times=1, wrong_bytes=True)],
    }
    with FaultyServer(root, faults) as running:
        yield running


@pytest.fixture(scope="module")
def runs(server, shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    make = recipe_maker(shapes, folder)

    def job(name, resume=None, engine=None, data=None, model=None, steps=STEPS):
        model = {"model": dict(make().model) | model} if model else {}
        recipe = make(
            data={"root": f"{server.url}/shapes", "cache_dir": str(folder / "cache"), "workers": 2} | (data or {}),
            engine={"micro_batch": 1} | (engine or {}),
            run={"dir": str(folder / name), "steps": steps, "checkpoint_every": 3, "keep_last": 4, "evaluate_every": 0},
            **model,
        )
        job = {"recipe": recipe.model_dump(mode="json")}
        return job | {"resume": str(folder / resume / "checkpoints" / "step-00000003")} if resume else job

    archive = {"root": f"{server.url}/archive", "labelled_count": 0}
    jobs = [
        job("whole", steps=12),
        job("continued", resume="whole", data={"workers": 0}, steps=12),
        job("other", resume="whole", engine={"micro_batch": 2, "accumulation": 2}),
        job("archive", data=archive, model={"pretrained": str(folder / "whole")}),
    ]
    done = launch(jobs, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def skipped(run):
    """Counted over all ranks, and listed by each of them."""
    counted = Counter()
    for record in records(run):
        counted.update(record.get("skipped", {}))
    files = sorted((run / "skipped").glob("rank-*.jsonl"))
    return counted, [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_each_shard_came_once_for_both_ranks(runs, server):
    """They share a cache; what was answered wrongly was asked for again."""
    shards = Counter(r.path for r in server.requests if r.path.startswith("shapes/unlabelled"))
    again = {path for path, count in shards.items() if count > 1}
    assert len(shards) == 8
    assert again <= {"shapes/unlabelled-000000.tar", "shapes/unlabelled-000001.tar"}


def test_skipped_samples_of_all_ranks_are_counted(runs):
    counted, listed = skipped(runs / "whole")
    # 12 steps of two images are one epoch.
    assert counted == Counter(entry["reason"] for entry in listed)
    assert {entry["key"] for entry in listed} == {"unlabelled-0002", "unlabelled-0013"}


def test_going_on_is_exact_with_other_workers(runs):
    assert [r["loss"] for r in records(runs / "continued")] == [r["loss"] for r in records(runs / "whole")][3:]
    before = Counter()
    for record in records(runs / "whole")[3:]:
        before.update(record.get("skipped", {}))
    assert skipped(runs / "continued")[0] == before


def test_going_on_with_other_batches(runs):
    """Of the 24 unlabelled samples 6 were taken before; three steps of 8 take the other 18, and 6 of the next epoch."""
    assert [r["step"] for r in records(runs / "other")] == [4, 5, 6]
    leg = json.loads((runs / "other" / "checkpoints" / "step-00000006" / "stream.json").read_text())["unlabelled"]
    (source,) = leg["sources"]
    left = {place for epoch, _, start, stop in source["left"] for place in range(start, stop) if epoch == 0}
    assert (len(left), leg["batch"], leg["start"], source["epoch"]) == (18, 8, 3, 1)


def test_a_run_without_labels_on_two_ranks(runs):
    for record in records(runs / "archive"):
        assert record["loss_x"] is None
        assert record["loss"] == pytest.approx(record["loss_u"] + record["loss_m"], rel=1e-5, abs=1e-7)
    assert json.loads((runs / "archive" / "data.json").read_text())["classes"] == ["ground", "square", "disc"]
