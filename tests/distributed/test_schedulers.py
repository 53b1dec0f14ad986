"""Ranks that a scheduler starts itself: no launcher, its own variables alone."""

import subprocess
import sys

import pytest

from tests.distributed.launching import environment, records

pytestmark = pytest.mark.distributed


def test_two_processes_of_a_slurm_step_are_one_job(make_recipe, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(run={"steps": 2, "evaluate_every": 0}).to_yaml())
    slurm = {
        "SLURM_JOB_ID": str(hash(str(tmp_path)) % 10_000),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    # A run within this process has set what a launcher would.
    torchs = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    clean = {name: value for name, value in environment(**slurm).items() if name not in torchs}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "maskmatch_scale", "train", str(recipe)],
            env=clean | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    shown = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(shown)
    assert "rank 0 of 2" in shown[0]
    run = tmp_path / "run"
    assert len(records(run)) == 2
    assert not list(tmp_path.glob("run.previous-*"))
    assert sorted(path.name for path in (run / "log").iterdir()) == ["rank-0.txt", "rank-1.txt"]
