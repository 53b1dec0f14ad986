"""Whole runs on shards without an index: killed and continued, and what is refused before anything is written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskmatch_scale.checkpoints.finding import find
from maskmatch_scale.errors import TrainingStopped, UserError
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback
from tests.data.batches.archive import SIZES, sequential, write_archive
from tests.data.faulty_server import Fault, FaultyServer

STEPS = 10


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("archive"))


def records(run, kind="train"):
    return [r for r in map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def recipe_of(make_recipe, shapes, folder, where, run=(), **data):
    """Of the unlabelled images every third is from an archive without an index."""
    mixed = [{"root": str(shapes), "weight": 2}, sequential(where)]
    # With this time-out the pauses between tries are short.
    read = {"unlabelled_per_labelled": 3, "workers": 2, "shuffle_window": 6, "fetch_timeout_s": 3.0}
    return make_recipe(
        data={"unlabelled": mixed} | read | data,
        engine={"micro_batch": 1, "accumulation": 2, "precision": "fp32", "library": "accelerate", "zero_stage": 0},
        method={"burn_in": 0.1},
        run={"dir": str(folder), "steps": STEPS, "checkpoint_every": 3, "evaluate_every": 0, "log_every": 1}
        | dict(run),
    )


@pytest.mark.slow
def test_killed_and_continued_with_the_losses_of_a_run_that_was_not(make_recipe, shapes, archive, tmp_path):
    faults = {"a-001.tar": [Fault(times=2, cut_after=9000)], "a-004.tar": [Fault(times=1, status=503)]}
    with FaultyServer(archive, faults) as server:
        whole = train(recipe_of(make_recipe, shapes, tmp_path / "whole", server.url))
        part = recipe_of(make_recipe, shapes, tmp_path / "part", server.url)
        (tmp_path / "part.yaml").write_text(part.to_yaml())
        command = [sys.executable, "-m", "maskmatch_scale", "train", str(tmp_path / "part.yaml")]
        metrics = tmp_path / "part" / "metrics.jsonl"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
            while not (metrics.exists() and b'"checkpoint"' in metrics.read_bytes()):
                assert job.poll() is None
                time.sleep(0.02)
            job.send_signal(signal.SIGKILL)
        stopped = find(tmp_path / "part")
        assert 0 < stopped.step < STEPS
        (rank,) = stopped.stream()["ranks"]
        assert len(rank["lanes"]["archive"]) == 2
        train(part, "auto")
    expected = {record["step"]: record["loss"] for record in records(whole)}
    done = records(tmp_path / "part")
    assert {record["step"] for record in done} == expected.keys()
    assert all(record["loss"] == expected[record["step"]] for record in done)
    assert sum(record.get("fetched", {}).get("mb", 0) for record in records(whole)) > 0
    assert "unlabelled" not in json.loads((whole / "data.json").read_text())["samples"]
    log = (whole / "log" / "rank-0.txt").read_text()
    assert f"8 labelled samples, unlabelled ones of {len(SIZES)} shards of 'archive', read in sequence" in log


def test_a_lost_network_stops_the_run_and_nothing_is_lost(make_recipe, shapes, archive, tmp_path):
    with FaultyServer(archive) as server:

        class Loses(Callback):
            def after_step(self, done, figures):
                if done == 4:
                    server.set_faults({"*": Fault(status=503)})

        data = {"outage_s": 0.3, "fetch_attempts": 2, "workers": 0, "max_bad_share": 1.0}
        recipe = recipe_of(make_recipe, shapes, tmp_path / "run", server.url, {"steps": 24}, **data)
        recipe = recipe.model_copy(update={"method": recipe.method.model_copy(update={"burn_in": 0.0})})
        with pytest.raises(TrainingStopped, match=r"could be fetched for data\.outage_s=0\.3 s.*--resume auto"):
            train(recipe, callbacks=[Loses])
        stopped = find(tmp_path / "run")
        assert stopped.step < 24
        listed = [json.loads(line) for line in (tmp_path / "run" / "skipped" / "rank-0.jsonl").read_text().splitlines()]
        assert {(skip["source"], skip["reason"]) for skip in listed} == {("archive", "unreachable")}
        server.set_faults({})
        train(recipe, "auto")
    assert {record["step"] for record in records(tmp_path / "run")} == set(range(1, 25))


def test_epochs_cannot_be_counted(make_recipe, shapes, archive, tmp_path):
    recipe = recipe_of(make_recipe, shapes, tmp_path / "run", archive, {"steps": 0, "epochs": 1.0})
    with pytest.raises(
        UserError, match=r"run\.epochs=1: nobody knows .* 'archive' .*set run\.steps, or write an index"
    ):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_a_supervised_run_counts_its_labelled_samples(make_recipe, shapes, archive, tmp_path):
    recipe = recipe_of(make_recipe, shapes, tmp_path / "run", archive, {"steps": 0, "epochs": 1.0})
    supervised = {"base": "supervised", "mask": recipe.method.mask.model_copy(update={"keep": None})}
    train(recipe.model_copy(update={"method": recipe.method.model_copy(update=supervised)}))
    assert len(records(tmp_path / "run")) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["data.unlabelled=[{shards: 'NOWHERE/*.tar'}]"], "NOWHERE/*.tar: no such file"),
        (["data.unlabelled=[{shards: 'pipe:cat x.tar'}]"], "data.allow_pipe=true"),
        (["data.sequential_lanes=3"], "data.sequential_lanes=3: 1 ranks × 2 loader processes"),
        (["data.workers=9"], "8 shards for 9 lanes"),
        (["run.steps=0", "run.epochs=1"], "run.epochs=1: nobody knows"),
        (["data.unlabelled=[{shards: a.tar, root: b}]"], "beside root, numbers of shards are written as 0-999"),
    ],
)
def test_one_line_and_exit_code_2(make_recipe, shapes, archive, tmp_path, capsys, monkeypatch, changed, message):
    from maskmatch_scale.cli import main as cli

    recipe = recipe_of(make_recipe, shapes, tmp_path / "run", archive)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    monkeypatch.setattr(sys, "argv", ["maskmatch", "train", str(tmp_path / "recipe.yaml"), *changed])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "run").exists()
