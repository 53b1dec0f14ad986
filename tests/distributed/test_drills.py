"""When a rank dies or stays away: the job ends with its message, within its time limit, and not with a hang."""

import time

import pytest

from tests.distributed.launching import deepspeed

pytestmark = pytest.mark.distributed

DRILL = """
import os, sys, time
from maskmatch_scale.cli import main as cli
from maskmatch_scale.training import loop
from maskmatch_scale.evaluation import evaluate

step, kind = loop.take_step, sys.argv.pop(1)

def drill(run, number, loader):
    if number == 2 and run.runtime.rank == 1:
        if kind == "raises":
            raise KeyError("the cat sat on the shard")
        if kind == "dies":
            os.kill(os.getpid(), 9)
        if kind == "stays-away":
            time.sleep(600)
    return step(run, number, loader)

loop.take_step = drill
if kind == "out-of-step":
    evaluate._run_empty = lambda segmenter, forwards, window: None
cli.main()
"""


@pytest.fixture
def drill(make_recipe, tmp_path):
    """Start a run on two ranks in which something happens to rank 1; returns the process and its seconds."""

    def start(kind, **sections):
        script = tmp_path / "drill.py"
        script.write_text(DRILL)
        engine = {"collective_timeout_s": 8, "zero_stage": 3}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(make_recipe(engine=engine, **sections).to_yaml())
        began = time.monotonic()
        return deepspeed(script, kind, "train", recipe, timeout_s=150), time.monotonic() - began

    return start


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raises", "rank 1: KeyError: 'the cat sat on the shard'"),
        ("dies", "rank 0: another rank has died"),
        ("stays-away", "rank 0: another rank did not join a collective within the time limit"),
        # The guard of lock-step evaluation taken away: rank 1 has one of five images fewer, and at ZeRO-3 every
        # forward is a collective.
        ("out-of-step", "did not join a collective within the time limit"),
    ],
)
def test_a_lost_rank_ends_the_job(drill, kind, message):
    done, seconds = drill(kind)
    shown = done.stdout + done.stderr
    assert done.returncode != 0
    assert message in shown, shown[-3000:]
    assert "Traceback" not in shown
    assert seconds < 100
