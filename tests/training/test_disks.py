"""Runs on a disk that is full for some time, or to the end."""

import errno
import json
from pathlib import Path

import pytest

from maskmatch_scale.errors import TrainingStopped
from maskmatch_scale.files import write_whole
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback


def filling(disk, full_after, free_after=None):
    class Filling(Callback):
        def between_steps(self, done):
            if done == full_after:
                disk.fill()
            if done == free_after:
                disk.free()

    return Filling


@pytest.fixture
def recipe_on(make_recipe, tmp_path):
    """A recipe of a run that has its records and its log on a small disk, and the rest on another one."""

    def make(disk, **run):
        folder = tmp_path / "run"
        folder.mkdir()
        (disk.path / "log").mkdir()
        (folder / "log").symlink_to(disk.path / "log")
        (folder / "metrics.jsonl").symlink_to(disk.path / "metrics.jsonl")
        return make_recipe(
            run={"dir": str(folder), "log_every": 1, **run},
            engine={"precision": "fp32", "library": "accelerate", "zero_stage": 0},
        )

    return make


def steps_in(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["step"] for record in records if record["kind"] == "train"]


def test_records_wait_while_a_disk_is_full(small_disk, recipe_on, capsys):
    disk = small_disk()
    # So many steps that the records need more than the page that the file has already.
    folder = train(recipe_on(disk, steps=20), callbacks=[filling(disk, 1, 19)])
    out, err = capsys.readouterr()
    assert steps_in(folder / "metrics.jsonl") == list(range(1, 21))
    assert f"warning: {folder}/metrics.jsonl: no room is left on this disk" in out
    assert "lines that waited have been written" in out
    assert err.count("maskmatch: warning: ") == 1  # of the log
    assert "records before this one could not be written" in (folder / "log" / "rank-0.txt").read_text()


def test_a_disk_that_stays_full(small_disk, recipe_on, capsys):
    disk = small_disk()
    recipe = recipe_on(disk, steps=20)
    folder = Path(recipe.run.dir)
    with pytest.raises(TrainingStopped, match=r"all 20 steps are taken, but \d+ records are lost: .*no room") as caught:
        train(recipe, callbacks=[filling(disk, 1)])
    assert not caught.value.on_all_ranks
    assert "Traceback" not in capsys.readouterr().err
    kept = steps_in(folder / "metrics.jsonl")
    assert 1 <= len(kept) < 20
    assert kept == list(range(1, len(kept) + 1))
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000020"
    assert (folder / "report.html").is_file()
    disk.free()
    train(recipe, "auto")


def test_what_cannot_be_written_at_the_end(make_recipe, small_disk, tmp_path):
    disk = small_disk()
    recipe = make_recipe(run={"steps": 1}, engine={"precision": "fp32", "library": "accelerate", "zero_stage": 0})

    class Moving(Callback):
        """Behind the last checkpoint the rest of the run goes to a full disk."""

        def ended(self):
            self.run.folder = RunFolder(disk.path)
            disk.fill()

    with pytest.raises(TrainingStopped) as caught:
        train(recipe, callbacks=[Moving])
    message = str(caught.value)
    assert message.startswith(f"after the last step: {disk.path}/summary.json: no room is left on this disk")
    assert "--resume auto" in message
    assert "step-00000001" in message
    assert not caught.value.on_all_ranks
    train(recipe, "auto")
    assert (tmp_path / "run" / "report.html").is_file()


def test_what_cannot_be_written_before_the_first_step_keeps_its_class(make_recipe, small_disk):
    """The command ends with code 2, as for a mistake of the user (docs/design.md)."""
    disk = small_disk()
    disk.fill()

    class Writing(Callback):
        def started(self):
            write_whole(disk.path / "notes.txt", "x")

    with pytest.raises(OSError) as caught:
        train(make_recipe(), callbacks=[Writing])
    assert caught.value.errno == errno.ENOSPC


def test_a_profile_that_does_not_fit(make_recipe, small_disk, tmp_path, capsys):
    disk = small_disk()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").symlink_to(disk.path)
    engine = {"precision": "fp32", "library": "accelerate", "zero_stage": 0}
    folder = train(make_recipe(run={"steps": 2, "profile": [1, 1]}, engine=engine))
    out = capsys.readouterr().out
    assert f"warning: no profile was written: {folder}/profile/rank-0.json.gz: no room is left" in out, out
    assert list(disk.path.iterdir()) == []
