"""How runs are started, and which signals reach them."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from maskmatch_scale.sweep.runner import train_command


def test_launchers_get_the_command_as_a_module():
    own = [sys.executable, "-m", "maskmatch_scale", "train"]
    module = ["maskmatch_scale", "train"]
    assert train_command([]) == own
    assert train_command(["deepspeed", "--num_gpus", "2"]) == ["deepspeed", "--num_gpus", "2", "--module", *module]
    assert train_command(["bin/torchrun", "--standalone"]) == ["bin/torchrun", "--standalone", "-m", *module]
    assert train_command(["launch/deepspeed.sh"]) == ["launch/deepspeed.sh"]
    assert train_command(["srun", *own]) == ["srun", *own]


COUNTS = """
import pathlib, signal, sys, time
arrived = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: arrived.append(number))
ready = pathlib.Path(sys.argv[1])
ready.touch()
began = time.monotonic()
while not arrived and time.monotonic() - began < 120:  # a test that fails leaves it behind
    time.sleep(0.01)
time.sleep(1.5)  # in which another would come
ready.write_text(str(len(arrived)))
sys.exit(75)
"""


def swept_with_signal(recipe_file, tmp_path, ready, launcher, send):
    """Sweep until a run has made the file `ready`, and send a signal; the exit code and stderr."""
    command = [sys.executable, "-m", "maskmatch_scale", "sweep", str(recipe_file), "optim.lr=1,2"]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "out"), "--launcher", launcher],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=clean,
        # As a shell without a terminal starts something in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    ) as process:  # fmt: skip
        until = time.monotonic() + 120
        while not ready.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        send(process.pid)
        _, err = process.communicate(timeout=150)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_the_run_once(recipe_file, tmp_path, number):
    """Also when the whole group of processes gets it, as at Ctrl-C."""
    ready = tmp_path / "ready"
    launcher = shlex.join([sys.executable, "-c", COUNTS, str(ready)])
    code, err = swept_with_signal(recipe_file, tmp_path, ready, launcher, lambda pid: os.killpg(pid, number))
    assert code == 75, err
    assert ready.read_text() == "1"
    assert f"got {number.name}; the sweep ends in optim.lr=1; go on with:" in err


LAUNCHES = """
import signal, subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]]).returncode)
"""


def test_launchers_live_on_and_their_ranks_get_sigterm(recipe_file, tmp_path):
    """SIGUSR1 would kill the launcher, and leave the ranks behind."""
    ready, torchrun = tmp_path / "ready", tmp_path / "torchrun"
    torchrun.write_text(f"#!{sys.executable}\n{LAUNCHES}")
    torchrun.chmod(0o755)
    launcher = shlex.join([str(torchrun), COUNTS, str(ready), "train"])
    code, err = swept_with_signal(recipe_file, tmp_path, ready, launcher, lambda pid: os.kill(pid, signal.SIGUSR1))
    assert code == 75, err
    assert ready.read_text() == "1"
    assert "got SIGUSR1; the sweep ends in optim.lr=1" in err


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells a process that its parent has ended")
def test_a_run_does_not_outlive_a_sweep_that_is_killed(recipe_file, tmp_path):
    ready = tmp_path / "ready"
    launcher = shlex.join([sys.executable, "-c", COUNTS, str(ready)])
    code, _ = swept_with_signal(recipe_file, tmp_path, ready, launcher, lambda pid: os.kill(pid, signal.SIGKILL))
    assert code == -signal.SIGKILL
    until = time.monotonic() + 60
    while not ready.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert ready.read_text() == "1"
