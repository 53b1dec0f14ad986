"""launch/slurm.sh as jobs of a real slurm: requeued in mid-run, they go on by themselves as if nothing had happened."""

import os
import time
from pathlib import Path

import pytest

from maskmatch_scale.engine.launchers import first_host
from tests.conftest import recipe_maker
from tests.distributed.launching import environment, records
from tests.distributed.slurm import Slurm, why_no_slurm

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(why_no_slurm() is not None, reason=f"slurm: {why_no_slurm()}"),
]

ROOT = Path(__file__).parents[2]
STEPS = 60


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    with cluster:
        yield cluster
    assert not cluster.processes()


@pytest.fixture
def submit(slurm, shapes, tmp_path):
    """Submit launch/slurm.sh with two ranks, one on each node, as a user does; returns number, run and output."""

    def submit(name, *, recipe=None, **variables):
        folder = tmp_path / name
        folder.mkdir()
        if recipe is None:
            recipe = folder / "recipe.yaml"
            run = {"steps": STEPS, "evaluate_every": 0, "checkpoint_every": 50}
            recipe.write_text(recipe_maker(shapes, folder)(data={"workers": 1}, run=run).to_yaml())
        # The names of the nodes are slurm's alone.
        more = environment(MASTER_ADDR="127.0.0.1", RANKS="1", PYTHONPATH=str(ROOT))
        more["PATH"] = f"{more['PATH']}{os.pathsep}{slurm.environment['PATH']}"
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
            more.pop(variable, None)
        more |= {"SLURM_CONF": slurm.environment["SLURM_CONF"]}
        output = folder / "output.txt"
        number = slurm.submit(
            "--nodes=2",
            f"--output={output}",
            ROOT / "launch" / "slurm.sh",
            recipe,
            variables=more | variables,
            cwd=ROOT,
        )
        return number, folder / "run", output

    return submit


def wait_for_steps(run, output, count):
    until = time.monotonic() + 300
    while not run.joinpath("metrics.jsonl").exists() or len(records(run)) < count:
        assert time.monotonic() < until, output.read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_job_that_is_stopped_goes_on(slurm, submit, launcher):
    number, run, output = submit("part", LAUNCHER=launcher)
    wait_for_steps(run, output, 5)
    slurm.run("scancel", "--signal=USR1", number)  # as slurm does before the time limit
    slurm.wait(number, "PENDING", restarts=1)
    first = len(records(run))
    assert f"stopped after step {first}, checkpoint" in output.read_text()
    wait_for_steps(run, output, first + 5)
    slurm.run("scontrol", "requeue", number)  # as it does when another job pre-empts this one
    slurm.wait(number, "PENDING", restarts=2)
    second = len(records(run))
    assert first < second < STEPS
    assert slurm.wait(number, "COMPLETED", "FAILED", timeout_s=400)["JobState"] == "COMPLETED", output.read_text()[
        -3000:
    ]
    whole, undisturbed, its_output = submit("whole")
    assert slurm.wait(whole, "COMPLETED", "FAILED", timeout_s=400)["JobState"] == "COMPLETED", its_output.read_text()
    losses = [(record["step"], record["loss"]) for record in records(run)]
    assert losses == [(record["step"], record["loss"]) for record in records(undisturbed)]


def test_a_mistake_is_not_queued_again(slurm, submit, tmp_path):
    (tmp_path / "wrong.yaml").write_text("run: {steeps: 3}\n")
    for variables, recipe, line in (
        ({}, tmp_path / "none.yaml", "none.yaml: no such recipe"),
        ({"RANKS": "two"}, None, "RANKS=two: not a whole number above 0"),
        ({}, tmp_path / "wrong.yaml", "maskmatch: error: "),
    ):
        number, _, output = submit(f"mistake-{line[:4]}", recipe=recipe, **variables)
        job = slurm.wait(number, "FAILED", "COMPLETED")
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
        assert line in output.read_text()


def test_what_the_variables_of_a_step_say(slurm):
    printed = slurm.run(
        "srun", "--nodes=2", "--ntasks-per-node=2", "bash", "-c",
        "echo $SLURM_PROCID $SLURM_LOCALID $SLURM_NTASKS $SLURM_STEP_TASKS_PER_NODE $SLURM_STEP_NODELIST",
    )  # fmt: skip
    ranks = sorted(line.split() for line in printed.splitlines())
    assert [rank[0] for rank in ranks] == ["0", "1", "2", "3"]
    assert [rank[1] for rank in ranks] == ["0", "1", "0", "1"]
    assert {tuple(rank[2:4]) for rank in ranks} == {("4", "2(x2)")}
    assert {first_host(rank[4]) for rank in ranks} == {"host1"}
