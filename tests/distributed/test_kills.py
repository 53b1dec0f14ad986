"""A job that is killed again and again, at moments that nobody chose, ends as if it never was."""

import random

import pytest

from tests.data.faulty_server import Fault, FaultyServer
from tests.distributed.killing import check_same_run, kill_until_done, train_whole

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 40


def test_killed_at_random_moments(shapes, make_recipe, tmp_path):
    with FaultyServer(shapes, {"*": [Fault(times=1, cut_after=3000)]}) as server:

        def recipe_in(folder):
            folder.mkdir()
            made = make_recipe(
                data={"root": server.url, "cache_dir": str(folder / "cache"), "workers": 2},
                engine={"micro_batch": 1},
                run={"dir": str(folder / "run"), "steps": STEPS, "checkpoint_every": 2, "evaluate_every": 0},
            )
            (folder / "recipe.yaml").write_text(made.to_yaml())
            return folder / "recipe.yaml"

        whole, part = recipe_in(tmp_path / "whole"), recipe_in(tmp_path / "part")
        train_whole(whole)
        kills = kill_until_done(part, tmp_path / "log.txt", random.Random(5))
    assert kills >= 3
    check_same_run(whole, part, STEPS)
