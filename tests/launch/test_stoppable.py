"""What stands in front of launchers, with a launcher that behaves like the worst of them."""

import os
import signal
import subprocess
import sys
import time
import uuid
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
os.write(1, b"rank\\\\n")  # print() may write the end of the line later, after that of the other rank
while True:
    time.sleep(1)
'''
ranks = [
    subprocess.Popen([sys.executable, "-c", rank, *sys.argv[1:]], env=os.environ | {"RANK": str(number)},
                     start_new_session=True)
    for number in range(2)
]
os.write(1, b"launched\\n")
for process in ranks:
    process.wait()
sys.exit(1)
"""


@pytest.fixture
def start():
    """Start it in front of a command; at the end nothing of it is left."""
    started, mark = [], uuid.uuid4().hex

    def start(*command, before=()):
        clean = {name: value for name, value in os.environ.items() if name != "RANK"} | {"STARTED_BY": mark}
        process = subprocess.Popen(
            [sys.executable, *before, str(STOPPABLE), *command], stdout=subprocess.PIPE, text=True, env=clean
        )
        started.append(process)
        return process

    yield start
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("STARTED_BY") == mark:
            process.kill()
    for process in started:
        process.communicate()


def lines(process, count):
    return sorted(process.stdout.readline().strip() for _ in range(count))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_the_ranks_are_told_and_their_code_counts(start, name):
    process = start(sys.executable, "-c", LAUNCHER, "0", "listens")
    assert lines(process, 3) == ["launched", "rank", "rank"]
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 75


WHILE_LAUNCHING = """
import os, runpy, signal, subprocess, sys
class Popen(subprocess.Popen):
    def _execute_child(self, *args):
        super()._execute_child(*args)  # the launcher runs
        os.kill(os.getpid(), getattr(signal, name))
subprocess.Popen, name, sys.argv = Popen, sys.argv[1], sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as for a script
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_while_the_launcher_is_started(start, name):
    process = start(sys.executable, "-c", LAUNCHER, "0", "listens", before=["-c", WHILE_LAUNCHING, name])
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


ELASTIC = """
import os, signal, subprocess, sys
rank = '''
import os, signal, sys, time
def end(*_):
    if os.environ["STARTED"] == "0":
        with open(os.environ["MASKMATCH_EXIT_CODE_FILE"], "w") as file:
            file.write("75")
    os._exit(75)
signal.signal(signal.SIGUSR1, end)
os.write(1, b"rank\\\\n")
time.sleep(0 if sys.argv[1] == "ends" else 600)
if os.environ["STARTED"] == "0":
    end()
'''
for number in range(100):  # whatever it ends with, another one is started; the job has ended when one ends with 0
    env = os.environ | {"RANK": "0", "STARTED": str(number)}
    code = subprocess.call([sys.executable, "-c", rank, sys.argv[1]], env=env)
    if code == 0:
        sys.exit(0)
"""


def test_ranks_that_were_told_are_not_started_again(start):
    process = start(sys.executable, "-c", ELASTIC, "waits")
    assert lines(process, 1) == ["rank"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_a_code_that_ranks_left_before_they_were_started_again_does_not_count(start):
    assert start(sys.executable, "-c", ELASTIC, "ends").wait(60) == 0


@pytest.mark.parametrize(
    ("program", "code"), [("pass", 0), ("exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_without_a_code_of_the_run_that_of_the_launcher_counts(start, program, code):
    assert start(sys.executable, "-c", program).wait(60) == code
