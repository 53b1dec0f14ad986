"""When a rank dies or stays away: the job ends with a line that names it, within its time limit, without a hang."""

import pickle
import socket
import subprocess
import time

import psutil
import pytest

from tests.distributed.launching import BIN, deepspeed_command, environment, records

pytestmark = pytest.mark.distributed

TIMEOUT_S = 12

DRILL = """
import json, os, signal, sys, time
from maskmatch_scale.cli import main as cli
from maskmatch_scale.training import loop
from maskmatch_scale.evaluation import evaluate

step, kind, lost = loop.take_step, sys.argv.pop(1), int(sys.argv.pop(1))

def drill(run, number, loader):
    if number == 2:
        folder = run.folder.path.parent
        (folder / f"rank-{run.runtime.rank}.pid").write_text(str(os.getpid()))
    if number == 2 and kind == "all-compute":
        time.sleep(20)
    if number == 2 and run.runtime.rank == lost:
        if kind == "raises":
            raise KeyError("the cat sat on the shard")
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "stays-away":
            time.sleep(600)
    return step(run, number, loader)

loop.take_step = drill
if kind == "out-of-step":
    evaluate._run_empty = lambda segmenter, forwards, window: None
cli.main()
"""

TORCHS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


class Drill:
    """A run on two ranks in which something happens to one of them."""

    def __init__(self, make_recipe, folder):
        self.folder, self.run = folder, folder / "run"
        self._make_recipe = make_recipe

    def start(self, kind, lost=1, launcher="deepspeed", **sections):
        """Run it to its end; returns what was printed and the exit code."""
        script = self.folder / "drill.py"
        script.write_text(DRILL)
        engine = {"collective_timeout_s": TIMEOUT_S, "zero_stage": 3}
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(self._make_recipe(data={"workers": 1}, engine=engine, **sections).to_yaml())
        arguments = [str(script), kind, str(lost), "train", str(recipe)]
        if launcher == "deepspeed":
            command = deepspeed_command(*arguments)
        else:
            command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--standalone", *arguments]
        # A run within this process has set what a launcher would.
        clean = {name: value for name, value in environment().items() if name not in TORCHS}
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300, check=False)
        shown = done.stdout + done.stderr
        (self.folder / "shown.txt").write_text(shown)
        return shown, done.returncode

    def log(self, rank):
        return (self.run / "log" / f"rank-{rank}.txt").read_text()

    def process(self, rank):
        return int((self.folder / f"rank-{rank}.pid").read_text())

    def left_over(self):
        """Processes of the job that still run, loader processes too; they get a moment to notice that it has ended."""
        deadline = time.monotonic() + 20
        while True:
            found = []
            for process in psutil.process_iter(["cmdline"]):
                if str(self.folder / "drill.py") in (process.info["cmdline"] or []):
                    found.append(process)
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.2)


@pytest.fixture
def drill(make_recipe, tmp_path):
    return Drill(make_recipe, tmp_path)


def test_a_rank_that_raises(drill):
    shown, code = drill.start("raises")
    assert code != 0
    assert "rank 1: KeyError: 'the cat sat on the shard'" in shown, shown[-3000:]
    assert "Traceback" not in shown
    assert not drill.left_over()


def test_a_rank_that_is_killed(drill):
    shown, code = drill.start("dies")
    assert code != 0
    expected = f"rank 0: another rank has died: rank 1 (host {socket.gethostname()}, process {drill.process(1)}, ended)"
    assert expected in shown, shown[-3000:]
    assert "Traceback" not in shown
    assert expected.removeprefix("rank 0: ") in drill.log(0)
    assert not drill.left_over()


@pytest.mark.parametrize(
    ("kind", "lost", "launcher", "place"),
    [
        pytest.param("stays-away", 1, "torchrun", ") is at step 3, in training.loop._take_", marks=pytest.mark.slow),
        pytest.param("stops", 1, "deepspeed", "stopped) is at step ", marks=pytest.mark.slow),
        # The one that has the store of the rendezvous in its process.
        pytest.param("stops", 0, "deepspeed", "stopped); something has stopped its process", marks=pytest.mark.slow),
        pytest.param("stops", 0, "torchrun", "stopped) is at step ", marks=pytest.mark.slow),
        pytest.param("stays-away", 0, "deepspeed", ") is at step 3, in training.loop._take_", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_does_not_come(drill, kind, lost, launcher, place):
    shown, code = drill.start(kind, lost, launcher)
    waiting = 1 - lost
    assert code != 0
    lines = [line for line in shown.splitlines() if "maskmatch: error: " in line]
    assert len(lines) == 1, shown[-3000:]
    assert f"maskmatch: error: rank {waiting}: " in lines[0]
    assert f"engine.collective_timeout_s={TIMEOUT_S}" in lines[0]
    assert f"rank {lost} (host {socket.gethostname()}, process {drill.process(lost)}" in lines[0]
    assert place in lines[0]
    # Where the rank waits; and where the other one is, if it can still write.
    assert "take_step" in drill.log(waiting)
    if kind == "stays-away":
        assert "in drill" in drill.log(lost)
    file = drill.run / "log" / f"collectives-rank-{waiting}"
    assert pickle.loads(file.read_bytes())["entries"]
    assert "in take_step" not in shown  # stacks are in the logs alone
    assert not drill.left_over()


@pytest.mark.slow
def test_ranks_out_of_step(drill):
    # The guard of lock-step evaluation taken away: rank 1 has one of five images fewer, and at ZeRO-3 every forward is
    # a collective.
    shown, code = drill.start("out-of-step")
    assert code != 0
    assert "rank 0: ranks wait for each other in different collectives" in shown, shown[-3000:]
    assert "in evaluation.evaluate.evaluate_split" in shown
    assert "Traceback" not in shown
    assert not drill.left_over()


@pytest.mark.slow
def test_ranks_that_compute_for_longer_than_the_limit(drill):
    shown, code = drill.start("all-compute", run={"evaluate_every": 0})
    assert code == 0, shown[-3000:]
    assert len(records(drill.run)) == 3
    assert "maskmatch: warning: rank 0: no collective for 12 s, and no rank waits for another" in shown
    assert "in drill" in drill.log(0)
    assert "in drill" in drill.log(1)
