"""Real signals to this process, and to a child of it."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from maskmatch_scale.errors import RESUMABLE, TrainingStopped
from maskmatch_scale.training.signals import INTERRUPTED, listening

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")


class Told:
    """What a run would be told."""

    def __init__(self):
        self.names, self._arrived = [], threading.Event()

    def __call__(self, name):
        self.names.append(name)
        self._arrived.set()

    def wait(self):
        assert self._arrived.wait(60)
        return self.names


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_told_and_raises_nothing(name):
    told, before = Told(), signal.getsignal(getattr(signal, name))
    with listening(NAMES) as signals:
        signals.keep(told)
        os.kill(os.getpid(), getattr(signal, name))
        assert told.wait() == [name]
    assert signal.getsignal(getattr(signal, name)) == before


def test_before_the_first_step_a_signal_ends_the_start_once():
    def start():
        with listening(NAMES):
            try:
                with suppress(Exception):  # as those who read damaged files have it
                    signal.raise_signal(signal.SIGUSR1)
            finally:
                signal.raise_signal(signal.SIGUSR1)  # a storm does not interrupt what ends

    with pytest.raises(TrainingStopped, match="got SIGUSR1 before the first step") as stopped:
        start()
    assert stopped.value.exit_code == RESUMABLE


def test_a_signal_to_a_forked_child_is_not_the_parents():
    told = Told()
    with listening(NAMES) as signals:
        signals.keep(told)
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(7)  # the inherited handler has done nothing
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        os.kill(os.getpid(), signal.SIGUSR1)
        assert told.wait() == ["SIGUSR1"]


def test_a_thread_listens_to_nothing():
    found = []
    thread = threading.Thread(target=lambda: found.append(listening(NAMES).__enter__()))
    thread.start()
    thread.join()
    assert found == [None]


BLOCKED = """
import os, sys, torch
from maskmatch_scale.training.signals import listening
with listening(["SIGINT", "SIGTERM"]) as signals:
    signals.keep(lambda name: os.write(1, f"{name}\\n".encode()))
    os.write(1, b"ready\\n")
    torch.futures.Future().wait()  # like a collective: not interrupted by signals
"""


def test_the_second_ctrl_c_ends_a_blocked_process_at_once():
    command = [sys.executable, "-c", BLOCKED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "SIGINT\n"
            process.send_signal(signal.SIGTERM)  # launchers send it after a Ctrl-C
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == INTERRUPTED
        finally:
            process.kill()


def test_in_a_session_the_second_ctrl_c_ends_the_run_and_not_the_process(monkeypatch):
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    told = Told()
    with listening(NAMES) as signals:
        signals.keep(told)
        signal.raise_signal(signal.SIGINT)
        assert told.wait() == ["SIGINT"]
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
