"""Killing a job of two ranks at moments that nobody chose, and comparing what it leaves with an undisturbed run."""

import json
import subprocess
import time

import psutil

from tests.distributed.launching import deepspeed_command, environment, records


def train_whole(recipe):
    """Train the recipe file on two ranks, without a fault; its run directory is `run` beside it."""
    command = deepspeed_command("--module", "maskmatch_scale", "train", recipe)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


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


def kill_until_done(recipe, log, moments):
    """Kill and resume the job until it ends by itself; returns how often it was killed."""
    kills = 0
    while not killed_at_random(recipe, log, moments):
        kills += 1
        assert kills < 30
    return kills


def stream_state(recipe, step):
    """Where the data of a recipe's run were after these steps."""
    return json.loads((recipe.parent / "run" / "checkpoints" / f"step-{step:08d}" / "stream.json").read_text())


def check_same_run(whole, part, steps):
    """Assert that the run of the recipe file `part`, which was killed, has the steps, losses and place of `whole`."""
    expected = {record["step"]: record["loss"] for record in records(whole.parent / "run")}
    done = records(part.parent / "run")
    assert {record["step"] for record in done} == expected.keys()
    # Steps between a checkpoint and a kill were done twice: alike.
    assert all(record["loss"] == expected[record["step"]] for record in done)
    assert stream_state(whole, steps) == stream_state(part, steps)
