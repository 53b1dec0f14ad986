"""What the operating system shows of other ranks' processes."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from maskmatch_scale.engine.processes import Ends, Process


@pytest.fixture
def other():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_the_states_of_a_process(other):
    process = Process(other.pid, Process.own().space)
    assert process.state == "running"
    other.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
    assert process.state == "stopped"
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert process.state == "ended"  # a zombie: its parent has not asked yet
    other.wait()
    assert process.state == "ended"


def test_a_process_of_another_machine_is_unknown():
    assert Process(os.getpid(), "elsewhere").state == "unknown"
    assert Process.own().state == "running"


HIDDEN = """
import os, sys
from maskmatch_scale.engine.processes import Process
own = Process.own()  # what this imports another user may not be able to read
os.setgid(65534)
os.setuid(65534)
print(*(Process(int(number), own.space).state for number in sys.argv[1:]))
"""


@pytest.mark.parametrize("hidepid", ["1", "2"])
def test_a_process_of_another_user_that_is_hidden_is_unknown(other, hidepid):
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root, to mount a /proc that hides processes")
    mount = f"mount -t proc -o hidepid={hidepid} proc /proc"
    private = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*private, mount], capture_output=True, check=False).returncode:
        pytest.skip("no /proc that hides processes can be mounted")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    python = shlex.join([sys.executable, "-c", HIDDEN, str(other.pid), str(ended.pid)])
    done = subprocess.run([*private, f"{mount} && {python}"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["unknown", "ended"], done.stderr


def test_the_end_of_a_process_is_noticed_at_once(other):
    ends = Ends({7: Process(other.pid, Process.own().space), 8: Process(os.getpid(), "elsewhere")})
    assert ends.wait(0) == []
    other.kill()
    assert ends.wait(60) == [7]
    assert ends.wait(0) == []
    ends.close()


def test_waiting_can_be_ended():
    ends = Ends({})
    threading.Timer(0.05, ends.wake).start()
    assert ends.wait(60) == []
    assert ends.wait(60) == []  # from now on
    ends.close()
