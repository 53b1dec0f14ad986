"""A job that is killed again and again, at moments that nobody chose, ends as if it never was."""

import json
import random
import subprocess
import time

import psutil
import pytest

from tests.data.faulty_server import Fault, FaultyServer
from tests.distributed.launching import deepspeed_command, environment, records

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 40


def killed_at_random(recipe, log, moments):
    """Start the job; kill it and all that it started when it has recorded a few more steps. Whether it ended first."""
    metrics = recipe.parent / "run" / "metrics.jsonl"
    before = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    command = deepspeed_command("--module", "maskmatch_scale", "train", recipe, "--resume", "auto")
    with log.open("ab") as output, subprocess.Popen(command, env=environment(), stdout=output, stderr=output) as job:
        enough = before + moments.randint(3, 8)
        while job.poll() is None:
            if metrics.exists() and len(metrics.read_bytes().splitlines()) >= enough:
                time.sleep(moments.uniform(0, 0.3))
                for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
                    process.kill()
            time.sleep(0.02)
    assert job.returncode in (0, -9), log.read_text()[-3000:]
    return job.returncode == 0


def test_killed_at_random_moments(shapes, make_recipe, tmp_path):
    moments = random.Random(5)
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
        subprocess.run(
            deepspeed_command("--module", "maskmatch_scale", "train", whole),
            env=environment(), check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        kills = 0
        while not killed_at_random(part, tmp_path / "log.txt", moments):
            kills += 1
            assert kills < 30
    assert kills >= 3
    expected = {record["step"]: record["loss"] for record in records(whole.parent / "run")}
    done = records(part.parent / "run")
    assert {record["step"] for record in done} == expected.keys()
    # Steps between a checkpoint and a kill were done twice: alike.
    assert all(record["loss"] == expected[record["step"]] for record in done)
    states = [
        json.loads((recipe.parent / "run" / "checkpoints" / f"step-{STEPS:08d}" / "stream.json").read_text())
        for recipe in (whole, part)
    ]
    assert states[0] == states[1]
