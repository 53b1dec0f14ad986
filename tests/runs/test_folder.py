"""A run directory is made whole, or everything is as it was."""

import shutil

import pytest

from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.data import RunData
from maskmatch_scale.runs.folder import open_folder

DATA = RunData(source="shapes", classes=("a", "b"), palette=((0, 0, 0), (1, 1, 1)), ignore_index=255, samples={})


def test_an_older_run_stays_if_there_is_no_room_for_a_new_one(small_disk, make_recipe):
    disk, recipe = small_disk(), make_recipe()
    folder = RunFolder(disk.path / "run")
    open_folder(folder, recipe, DATA, continued=False)
    before = {path: path.read_bytes() for path in disk.path.rglob("*.*")}
    for leave in (0, 4096):
        disk.fill(leave)
        with pytest.raises(OSError) as caught:
            open_folder(folder, recipe, DATA, continued=False)
        assert str(folder.path) in caught.value.filename
        disk.free()
        assert {path: path.read_bytes() for path in disk.path.rglob("*.*")} == before
    disk.fill()
    with pytest.raises(OSError):
        open_folder(folder, recipe, DATA, continued=True)
    disk.free()
    assert {path: path.read_bytes() for path in disk.path.rglob("*.*")} == before
    shutil.rmtree(folder.path)
    disk.fill(leave=4096)
    with pytest.raises(OSError):
        open_folder(folder, recipe, DATA, continued=False)
    assert not folder.path.exists()


def test_only_its_owner_may_read_a_recipe_with_a_password(make_recipe, tmp_path):
    modes = {}
    for root in ("https://me:hunter2@host/shards", "https://host/shards"):
        open_folder(RunFolder(tmp_path / "run"), make_recipe(data={"root": root}), DATA, continued=True)
        modes[root] = (tmp_path / "run" / "recipe.yaml").stat().st_mode & 0o077
        assert root in (tmp_path / "run" / "recipe.yaml").read_text()  # it is needed to evaluate the run
    assert modes["https://me:hunter2@host/shards"] == 0
    assert modes["https://host/shards"] != 0
