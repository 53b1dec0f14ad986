"""What stands in front of launchers, with a launcher that behaves like the worst of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

STOPPABLE = Path(__file__).parents[2] / "launch" / "stoppable.py"

LAUNCHER = """
import os, signal, subprocess, sys
# Ranks in sessions of their own, as torchrun has them; its own code, whatever theirs is; dies of SIGUSR1 if it can.
rank = '''
import os, signal, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # has RANK too; SIGUSR1 kills it
def stop(*_):
    time.sleep(0.5)  # a checkpoint
    assert helper.poll() is None
    helper.kill()
    with open(os.environ["MASKMATCH_EXIT_CODE_FILE"], "w") as file:
        file.write("75")
    os._exit(75)
time.sleep(float(sys.argv[1]))  # imports, in which nobody listens
if sys.argv[2] == "listens":
    signal.signal(signal.SIGUSR1, stop)
print("rank", flush=True)
while True:
    time.sleep(1)
'''
ranks = [
    subprocess.Popen([sys.executable, "-c", rank, *sys.argv[1:]], env=os.environ | {"RANK": str(number)},
                     start_new_session=True)
    for number in range(2)
]
print("launched", flush=True)
for process in ranks:
    process.wait()
sys.exit(1)
"""


@pytest.fixture
def start():
    """Start it in front of a command; at the end nothing of it is left."""
    started = []

    def start(*command, **options):
        clean = {name: value for name, value in os.environ.items() if name != "RANK"}
        process = subprocess.Popen(
            [sys.executable, str(STOPPABLE), *command], stdout=subprocess.PIPE, text=True, env=clean, **options
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
        process.communicate()


def lines(process, count):
    return sorted(process.stdout.readline().strip() for _ in range(count))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_the_ranks_are_told_and_their_code_counts(start, name):
    process = start(sys.executable, "-c", LAUNCHER, "0", "listens")
    assert lines(process, 3) == ["launched", "rank", "rank"]
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 75


def test_ranks_that_cannot_listen_yet_are_told_again(start):
    process = start(sys.executable, "-c", LAUNCHER, "1.5", "listens")
    assert lines(process, 1) == ["launched"]
    time.sleep(0.3)  # until their interpreters run
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_the_second_ctrl_c_kills_all(start):
    process = start(sys.executable, "-c", LAUNCHER, "0", "does not listen")
    assert lines(process, 3) == ["launched", "rank", "rank"]
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 5
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)  # two signals of one kind that wait together are one
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    _, there = psutil.wait_procs(children, timeout=10)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in there)


@pytest.mark.parametrize(
    ("program", "code"), [("pass", 0), ("exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_without_a_code_of_the_run_that_of_the_launcher_counts(start, program, code):
    assert start(sys.executable, "-c", program).wait(60) == code
