"""The lock of a run directory, with real processes that hold it, die, and race for it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from maskmatch_scale.engine.processes import Process
from maskmatch_scale.errors import UserError
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs import lock
from maskmatch_scale.runs.lock import FolderLock, OccupiedError, Owner, refuse_live_run

HOLDS = """
import sys
from pathlib import Path
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.lock import FolderLock, OccupiedError
print("ready", flush=True)
sys.stdin.readline()
try:
    held = FolderLock(RunFolder(Path(sys.argv[1])))
    print("held", flush=True)
except OccupiedError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


class Holder:
    """A process that tries to take the lock when it is told to, and then waits."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def go(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def answer(self):
        return self.process.stdout.readline().strip()


@pytest.fixture
def holders(tmp_path):
    made = []

    def make(count):
        made.extend(Holder(tmp_path / "runs" / "run") for _ in range(count))
        return made

    yield make
    for holder in made:
        holder.process.kill()
        holder.process.communicate()


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "runs" / "run")


@pytest.fixture
def soon(monkeypatch):
    """Signs of life of other machines come and are missed within tenths of seconds."""
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "SILENT_S", 0.5)


def test_a_live_owner_is_named_and_nothing_changes(holders, folder):
    (holder,) = holders(1)
    holder.go()
    assert holder.answer() == "held"
    before = folder.lock.read_bytes()
    named = rf"another run writes there \(process {holder.process.pid} on "
    for refused in (FolderLock, refuse_live_run):
        with pytest.raises(OccupiedError, match=named) as caught:
            refused(folder)
        assert "\n" not in str(caught.value)
    assert [path.name for path in folder.path.iterdir()] == [".lock"]
    assert folder.lock.read_bytes() == before


def test_a_stopped_owner_lives(holders, folder):
    (holder,) = holders(1)
    holder.go()
    assert holder.answer() == "held"
    holder.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, holder.process.pid, os.WSTOPPED | os.WNOWAIT)
    with pytest.raises(OccupiedError):
        FolderLock(folder)


def test_of_several_at_once_one_gets_a_dead_ones_lock(holders, folder):
    """All of them find the lock of a process that was killed, and nothing of it is left behind."""
    first, *others = holders(7)
    first.go()
    assert first.answer() == "held"
    first.process.kill()
    first.process.wait()
    for holder in others:
        holder.go()
    answers = [holder.answer() for holder in others]
    assert answers.count("held") == 1, answers
    winner = others[answers.index("held")].process.pid
    assert all(f"(process {winner} on " in answer for answer in answers if answer != "held"), answers
    assert [path.name for path in folder.path.iterdir()] == [".lock"]
    assert json.loads(folder.lock.read_text())["process"]["number"] == winner


def test_of_several_at_once_one_gets_a_new_folder(holders, folder):
    made = holders(6)
    for holder in made:
        holder.go()
    assert [holder.answer() for holder in made].count("held") == 1


def test_release_and_again(folder):
    FolderLock(folder).release()
    assert not folder.lock.exists()
    again = FolderLock(folder)
    assert again.dead is None
    again.release()


def test_a_number_that_another_process_has_now(folder):
    """Numbers of processes are used again: the lock names this process's number, but an earlier start."""
    folder.path.mkdir(parents=True)
    own = Owner.this()
    earlier = replace(own, process=replace(own.process, started=own.process.started - 1))
    folder.lock.write_text(json.dumps(asdict(earlier)))
    refuse_live_run(folder)
    taken = FolderLock(folder)
    assert taken.dead == earlier
    taken.release()


def test_another_machines_owner_that_is_silent(folder, soon, capsys):
    folder.path.mkdir(parents=True)
    elsewhere = replace(Owner.this(), host="gpu007", process=Process(1, "elsewhere"))
    folder.lock.write_text(json.dumps(asdict(elsewhere)))
    refuse_live_run(folder)  # leaves it to rank 0, which waits
    taken = FolderLock(folder)
    assert taken.dead == elsewhere
    assert "on gpu007" in capsys.readouterr().err
    taken.release()


def test_another_machines_owner_that_lives(folder, soon, monkeypatch):
    held = FolderLock(folder)
    # Seen from another machine: its process cannot be looked at.
    monkeypatch.setattr(Process, "is_near", property(lambda process: False))
    with pytest.raises(OccupiedError, match="another run writes there"):
        FolderLock(folder)
    held.release()


@pytest.mark.parametrize("text", ["", "{}", "half a li"])
def test_a_lock_that_cannot_be_read(folder, soon, text):
    folder.path.mkdir(parents=True)
    folder.lock.write_text(text)
    FolderLock(folder).release()
    assert not folder.lock.exists()


def test_file_systems_without_links(folder, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    held = FolderLock(folder)
    with pytest.raises(OccupiedError):
        FolderLock(folder)
    held.release()
    assert not list(folder.path.iterdir())


def test_moving_aside_keeps_the_lock(folder):
    held = FolderLock(folder)
    folder.recipe.write_text("older")
    aside = folder.path.with_name("run.previous-1")
    held.move_aside(aside)
    assert [path.name for path in aside.iterdir()] == ["recipe.yaml"]
    assert [path.name for path in folder.path.iterdir()] == [".lock"]
    with pytest.raises(OccupiedError):
        FolderLock(folder)
    held.release()


def test_a_lock_that_somebody_has_removed_is_made_again(folder, soon):
    held = FolderLock(folder)
    folder.lock.unlink()
    until = time.monotonic() + 20
    while not folder.lock.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(OccupiedError):
        FolderLock(folder)
    held.release()
    assert not folder.lock.exists()


LOSES = """
import json, sys, time
from dataclasses import asdict, replace
from pathlib import Path
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs import lock
lock.BEAT_S = 0.05
held = lock.FolderLock(RunFolder(Path(sys.argv[1])))
folder = RunFolder(Path(sys.argv[1]))
folder.lock.write_text(json.dumps(asdict(replace(held.owner, host="gpu007", token="other"))))
time.sleep(60)
"""


def test_who_has_lost_the_lock_ends_at_once(folder):
    done = subprocess.run(
        [sys.executable, "-c", LOSES, str(folder.path)], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "on gpu007, since " in done.stderr
    assert f"has taken {folder.path} over" in done.stderr


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"run\.dir=.*cannot be written to"):
        FolderLock(RunFolder(tmp_path / "runs" / "run"))
