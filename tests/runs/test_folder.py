"""A run directory is made whole, or everything is as it was."""

import shutil

import pytest
import torch

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.errors import UserError
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.data import RunData
from maskmatch_scale.runs.folder import open_folder

DATA = RunData(source="shapes", classes=("a", "b"), palette=((0, 0, 0), (1, 1, 1)), ignore_index=255, samples={})
ALONE = Runtime(Place(0, 0, 1, 1), torch.device("cpu"), 1)


def open_and_close(folder, recipe, *, continued=False):
    with open_folder(folder, recipe, DATA, ALONE, continued=continued):
        assert folder.lock.exists()


def test_an_older_run_stays_if_there_is_no_room_for_a_new_one(small_disk, make_recipe):
    disk, recipe = small_disk(), make_recipe()
    folder = RunFolder(disk.path / "run")
    open_and_close(folder, recipe)
    before = {path: path.read_bytes() for path in disk.path.rglob("*.*")}
    # There is room for nothing, the lock, the description of the data.
    for leave, continued in ((0, False), (4096, False), (8192, False), (0, True), (4096, True)):
        disk.fill(leave)
        with pytest.raises(UserError, match=str(folder.path)) as caught:
            open_and_close(folder, recipe, continued=continued)
        assert caught.value.on_all_ranks
        disk.free()
        assert {path: path.read_bytes() for path in disk.path.rglob("*.*")} == before
    shutil.rmtree(folder.path)
    for leave in (0, 4096, 8192):
        disk.fill(leave)
        with pytest.raises(UserError):
            open_and_close(folder, recipe)
        disk.free()
        assert not folder.path.exists()


def test_only_its_owner_may_read_a_recipe_with_a_password(make_recipe, tmp_path):
    modes = {}
    for root in ("https://me:hunter2@host/shards", "https://host/shards"):
        open_and_close(RunFolder(tmp_path / "run"), make_recipe(data={"root": root}), continued=True)
        modes[root] = (tmp_path / "run" / "recipe.yaml").stat().st_mode & 0o077
        assert root in (tmp_path / "run" / "recipe.yaml").read_text()  # it is needed to evaluate the run
    assert modes["https://me:hunter2@host/shards"] == 0
    assert modes["https://host/shards"] != 0
