"""Two ranks on shards without an index, from a server that fails: killed between checkpoints, and on other ranks."""

import json

import pytest

from maskmatch_scale.train import train
from tests.conftest import recipe_maker
from tests.data.batches.archive import sequential, write_archive
from tests.data.faulty_server import Fault, FaultyServer
from tests.distributed.launching import launch, records

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 9
STOP = 5


@pytest.fixture(scope="module")
def runs(shapes, tmp_path_factory):
    """`whole`; `continued` with one loader process a rank instead of two; `alone` on one rank with all lanes."""
    folder = tmp_path_factory.mktemp("sequential")
    archive = write_archive(folder / "archive")
    make = recipe_maker(shapes, folder)
    faults = {"a-001.tar": [Fault(times=2, status=503)], "a-004.tar": [Fault(times=1, cut_after=9000)]}

    def recipe_of(name, where, workers, micro_batch=1):
        mixed = [{"root": str(shapes)}, sequential(where)]
        return make(
            data={"unlabelled": mixed, "unlabelled_per_labelled": 4, "workers": workers, "shuffle_window": 6},
            engine={"micro_batch": micro_batch, "precision": "fp32"},
            method={"burn_in": 0.0},
            run={"dir": str(folder / name), "steps": STEPS, "checkpoint_every": STOP, "evaluate_every": 0},
        )

    stopped = str(folder / "whole" / "checkpoints" / f"step-{STOP:08d}")
    with FaultyServer(archive, faults) as server:
        jobs = [
            {"recipe": recipe_of("whole", server.url, 2).model_dump(mode="json")},
            {"recipe": recipe_of("continued", server.url, 1).model_dump(mode="json"), "resume": stopped},
        ]
        done = launch(jobs, folder)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        train(recipe_of("alone", server.url, 2, micro_batch=2), stopped)
    return folder


def lanes(run, step):
    """Where each lane of the archive is, by the rank that has it."""
    stream = json.loads((run / "checkpoints" / f"step-{step:08d}" / "stream.json").read_text())
    return [rank["lanes"]["archive"] for rank in stream["ranks"]]


def test_going_on_is_exact(runs):
    whole = [record["loss"] for record in records(runs / "whole")]
    assert [record["loss"] for record in records(runs / "continued")] == whole[STOP:]
    assert lanes(runs / "continued", STEPS) == lanes(runs / "whole", STEPS)


def test_each_rank_has_lanes_of_its_own_in_the_checkpoint(runs):
    assert [list(rank) for rank in lanes(runs / "whole", STOP)] == [["0", "1"], ["2", "3"]]


def test_another_number_of_ranks_takes_whole_lanes(runs):
    (alone,) = lanes(runs / "alone", STEPS)
    before = {lane: state for rank in lanes(runs / "whole", STOP) for lane, state in rank.items()}
    assert list(alone) == ["0", "1", "2", "3"]
    assert all(alone[lane] > before[lane] for lane in alone)
    assert [record["step"] for record in records(runs / "alone")] == list(range(STOP + 1, STEPS + 1))
