"""Locks between processes: what a forked child has of its parent's."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from maskmatch_scale.data.remote import file_locks


@pytest.mark.parametrize("make", ["create", "take"])
def test_a_child_that_is_forked_while_a_thread_opens_a_file_has_it_not(tmp_path, monkeypatch, make):
    path, opened = tmp_path / "file", threading.Event()
    plain = {"create": Path.open, "take": os.open}[make]

    def slow(*arguments, **options):
        file = plain(*arguments, **options)
        if path in arguments:
            opened.set()
            time.sleep(0.2)  # a fork would fall in here
        return file

    made = []
    with monkeypatch.context() as patched:
        if make == "create":
            patched.setattr(Path, "open", slow)
            thread = threading.Thread(target=lambda: made.append(file_locks.create(path)))
        else:
            patched.setattr(os, "open", slow)
            kept = {"wait": True, "may_be_removed": False}
            thread = threading.Thread(target=lambda: made.append(file_locks.take(path, **kept)))
        thread.start()
        opened.wait()
        if (child := os.fork()) == 0:
            links = [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]
            os._exit(int(str(path) in links))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join()
    assert file_locks.is_held(str(path))
    file_locks.release(made[0] if make == "take" else made[0].fileno())
    assert not file_locks.is_held(str(path))
