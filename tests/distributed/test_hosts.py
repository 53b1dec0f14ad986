"""Ranks on two hosts: the deepspeed launcher by ssh, two of torchrun that come and go, and accelerate on both.

The hosts are names of this machine: what is tested is how ranks are started, told and asked for their code. Hosts with
addresses of their own are in benchmarks/drill_hosts.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from maskmatch_scale.engine.setup import _free_port
from tests.distributed.launching import environment, records
from tests.distributed.ssh import Ssh, why_no_ssh

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 2000
"""More than any of these runs takes."""


class Started:
    """Scripts that were started; ended with all that they have started, at the end."""

    def __init__(self, folder, make_recipe):
        self.run, self.recipe, self._folder = folder / "run", folder / "recipe.yaml", folder
        run = {"steps": STEPS, "evaluate_every": 0, "checkpoint_every": 10}
        engine = {"collective_timeout_s": 20}
        self.recipe.write_text(make_recipe(data={"workers": 1}, engine=engine, run=run).to_yaml())
        self._processes = []

    def __call__(self, script, **variables):
        clean = {name: value for name, value in environment().items() if name not in ("RANK", "WORLD_SIZE")}
        clean = {name: value for name, value in clean.items() if not name.startswith(("LOCAL_", "MASTER_"))}
        with (self._folder / "shown.txt").open("ab") as output:
            process = subprocess.Popen(
                [LAUNCH / script, self.recipe, "--resume", "auto"],
                env=clean | variables, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return process

    @property
    def shown(self):
        return (self._folder / "shown.txt").read_text()

    def wait_for_steps(self, count=3):
        known, until = self._steps(), time.monotonic() + 240
        while self._steps() < known + count:
            assert time.monotonic() < until, self.shown[-3000:]
            time.sleep(0.05)

    def _steps(self):
        metrics = self.run / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    def left_over(self):
        return [p for p in psutil.process_iter(["cmdline"]) if str(self.recipe) in " ".join(p.info["cmdline"] or [])]

    def end(self):
        for process in self.left_over():
            process.kill()
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def start(tmp_path, make_recipe):
    started = Started(tmp_path, make_recipe)
    yield started
    started.end()


@pytest.mark.skipif(why_no_ssh("pdsh") is not None, reason=f"ssh: {why_no_ssh('pdsh')}")
def test_deepspeed_over_ssh_is_stopped_and_goes_on(start, tmp_path):
    (tmp_path / "ssh").mkdir()
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two names of this machine\nhost1 slots=1\nhost2 slots=1\n")
    with Ssh(tmp_path / "ssh", ("host1", "host2")) as ssh:
        variables = {"HOSTFILE": str(hostfile), "MASTER_ADDR": "127.0.0.1", "PATH": ssh.path(environment()["PATH"])}
        first = start("deepspeed.sh", **variables)
        start.wait_for_steps()
        first.terminate()
        assert first.wait(120) == 75, start.shown[-3000:]
        done = records(start.run)[-1]["step"]
        assert start.shown.count(f"stopped after step {done}, checkpoint") == 2  # a line of each host
        assert not start.left_over()
        again = start("deepspeed.sh", **variables)
        start.wait_for_steps()
        assert [record["step"] for record in records(start.run)][: done + 1] == list(range(1, done + 2))
        for _ in range(2):  # the second one ends it at once, on the other hosts too
            again.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert again.wait(120) == 130
        until = time.monotonic() + 20
        while start.left_over() and time.monotonic() < until:
            time.sleep(0.2)
        assert not start.left_over()


def test_torchrun_goes_on_with_the_machine_that_is_left(start):
    variables = {"NNODES": "1:2", "RANKS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
    first = start("torchrun.sh", **variables)
    time.sleep(3)  # it has the rendezvous
    second = start("torchrun.sh", **variables)
    start.wait_for_steps(15)  # past a checkpoint
    before = start.shown
    assert "on 2 ranks" in before or "rank 0 of 2" in before, before[-3000:]
    for process in [*psutil.Process(second.pid).children(recursive=True), psutil.Process(second.pid)]:
        process.kill()  # the machine is gone
    known = len(records(start.run))
    until = time.monotonic() + 240
    while len(records(start.run)) < known + 5 or "rank 0 of 1" not in start.shown[len(before) :]:
        assert time.monotonic() < until, start.shown[-4000:]
        assert first.poll() is None, start.shown[-4000:]
        time.sleep(0.2)
    first.terminate()
    assert first.wait(120) == 75, start.shown[-3000:]
    assert not start.left_over()


def test_accelerate_on_two_machines(start):
    variables = {"NNODES": "2", "RANKS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
    machines = [start("accelerate.sh", NODE_RANK=str(number), **variables) for number in range(2)]
    start.wait_for_steps()
    for machine in machines:
        os.kill(machine.pid, signal.SIGTERM)
    assert [machine.wait(120) for machine in machines] == [75, 75], start.shown[-3000:]
    assert f"stopped after step {records(start.run)[-1]['step']}, checkpoint" in start.shown
