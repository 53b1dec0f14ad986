"""Loader processes ignore what stops a run, and end with their parent, whatever they are doing."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import psutil
import pytest
from torch.utils.data import Dataset

from maskmatch_scale.data.batches.processes import in_processes

SCRIPT = """
import os, signal, sys, time
from contextlib import closing
from tests.data.batches.test_processes import samples
with closing(samples()) as loaded:
    print(os.getpid(), *(next(loaded) for _ in range(2)), flush=True)
    time.sleep(60)
"""


class Slow(Dataset):
    """Numbers of loader processes; every later sample takes a minute."""

    def __getitem__(self, number):
        if number > 1:
            time.sleep(60)
        return os.getpid()


def samples():
    """From two loader processes, both busy with what takes a minute when their first samples are taken."""
    return in_processes(Slow(), range(8), workers=2, ahead=2)


def ended(processes, timeout_s):
    """Whether all end in time. What nobody has asked for its code yet has ended, too."""
    _, there = psutil.wait_procs(processes, timeout=timeout_s)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in there)


@pytest.fixture
def job():
    """A process with two loader processes, and these."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        own, *loaders = map(int, parent.stdout.readline().split())
        assert own == parent.pid
        yield parent, [psutil.Process(number) for number in loaders]
        parent.kill()


def test_they_end_at_once_after_a_sigkill_of_the_parent(job):
    parent, loaders = job
    parent.kill()
    assert ended(loaders, 20)  # torch looks for its parent between samples: in a minute


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_they_ignore_what_stops_a_run(job, name):
    _, loaders = job
    for loader in loaders:
        loader.send_signal(getattr(signal, name))
    assert not ended(loaders, 0.5)


def test_closing_does_not_wait_for_what_they_are_doing():
    with closing(samples()) as loaded:
        loaders = [psutil.Process(next(loaded)) for _ in range(2)]
    assert ended(loaders, 0)  # torch waits 5 s for each, then sends what they ignore


def test_a_loader_that_was_not_closed_does_not_hold_up_the_exit():
    script = "from tests.data.batches.test_processes import samples\nloaded = samples()\nnext(loaded)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, timeout=50, check=True)
