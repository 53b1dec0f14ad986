"""A container with little shared memory: one line, before anything is written."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from maskmatch_scale.data.batches import loading
from maskmatch_scale.data.batches.loading import check_shared_memory, load_batches
from maskmatch_scale.data.faults import DataError
from tests.data.batches.common import make_batches

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="mounting a small /dev/shm needs root"
)
LARGE = {"data": {"workers": 2, "crop_px": 1024}, "engine": {"micro_batch": 3}}
"""Slots of 26 MB each, of which there are five."""


def with_little_memory(size, *command):
    """Run a command where /dev/shm has this size, in a mount namespace of its own."""
    mount = f"mount -t tmpfs -o size={size} none /dev/shm"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *command],
        capture_output=True,
        text=True,
        env=environment,
    )


@needs_root
def test_training_where_docker_gives_64_mb(make_recipe, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(**LARGE).model_dump(mode="json")))
    command = (sys.executable, "-m", "maskmatch_scale", "train", str(recipe))
    done = with_little_memory("64m", *command)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    there, needed = map(int, re.search(r"/dev/shm has (\d+) MB free, .* need (\d+) MB", line).groups())
    assert (there, "--shm-size=1g" in line) == (67, True)
    assert needed > 100
    assert not (tmp_path / "run").exists()


@needs_root
def test_what_is_counted_is_what_is_needed(make_recipe, tmp_path):
    """With as much as is asked for it is enough; with a little less it is not."""
    script = tmp_path / "load.py"
    recipe = make_recipe(**LARGE)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    script.write_text(
        "import sys\n"
        "from maskmatch_scale.data.batches.loading import load_batches\n"
        "from maskmatch_scale.data.batches.training import TrainingBatches\n"
        "from maskmatch_scale.recipe import Recipe\n"
        "recipe = Recipe.model_validate_json(open(sys.argv[1]).read())\n"
        "print(len(list(load_batches(TrainingBatches(recipe, 3, 0, 1, unlabelled=True), 0, 3))))\n"
    )
    made = make_batches(make_recipe, **LARGE)
    needed = loading._shared_memory_needed(made, 5, 1)
    for kilobytes, enough in ((needed // 1024, True), (needed // 1024 - 1100, False)):  # without the locks, and less
        done = with_little_memory(f"{kilobytes}k", sys.executable, str(script), str(tmp_path / "recipe.json"))
        assert (done.returncode == 0) == enough, done.stderr
        if not enough:
            assert "DataError: /dev/shm has" in done.stderr.splitlines()[-1]


@needs_root
def test_an_evaluation_whose_images_do_not_fit(shapes, tmp_path):
    """Their sizes are not known before. A failure in the thread of a queue would leave the run waiting for ever."""
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import sys\n"
        "from maskmatch_scale.data.batches.held_out import evaluation_samples\n"
        "from maskmatch_scale.recipe import DataRecipe\n"
        "print(len(list(evaluation_samples(DataRecipe(root=sys.argv[1]), 'dev', workers=2))))\n"
    )
    for size, enough in (("2m", True), ("80k", False)):
        done = with_little_memory(size, sys.executable, str(script), str(shapes))
        assert (done.returncode == 0) == enough, done.stderr
        if not enough:
            assert re.search(r"DataError: dev-\d+: /dev/shm has no room.*--shm-size", done.stderr.splitlines()[-1])


def test_all_ranks_of_the_machine_are_counted(make_recipe, monkeypatch):
    made = make_batches(make_recipe, **LARGE)
    monkeypatch.setattr(loading, "_free_shared_memory", lambda: loading._shared_memory_needed(made, 5, 3))
    check_shared_memory(made, 100, 3)
    with pytest.raises(DataError, match="4 ranks on this machine"):
        check_shared_memory(made, 100, 4)
    check_shared_memory(made, 1, 4)  # one process for one batch, with three slots
    check_shared_memory(make_batches(make_recipe, data={"workers": 0}), 100, 1000)


def test_other_failures_keep_their_message(make_recipe, monkeypatch):
    monkeypatch.setattr(loading._Slot, "like", lambda *_: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        next(load_batches(make_batches(make_recipe, data={"workers": 1}), 0, 3))
