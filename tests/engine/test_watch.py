"""The thread that watches other ranks: its parts. `tests/distributed/test_drills.py` has the whole."""

import faulthandler
import os
import re
import threading
from pathlib import Path

import torch

from maskmatch_scale.engine import watch
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.engine.watch import _innermost, watch_ranks


def test_a_single_rank_watches_nobody(tmp_path):
    before, enabled = threading.active_count(), faulthandler.is_enabled()
    with (
        watch_ranks(Runtime(Place(0, 0, 1, 1), torch.device("cpu"), 1), 1) as watching,
        watching.logging_to(tmp_path / "log", tmp_path / "collectives"),
    ):
        watching.step = 1
        assert threading.active_count() == before
        assert faulthandler.is_enabled() == enabled
    assert not (tmp_path / "log").exists()


def test_the_place_of_a_thread_is_its_innermost_functions_of_the_package(monkeypatch):
    go_on, there = threading.Event(), threading.Event()

    def inner():
        there.set()
        go_on.wait()

    def outer():
        inner()

    thread = threading.Thread(target=outer)
    thread.start()
    there.wait()
    assert _innermost(thread.ident) == "code of others"  # a test is no part of the package
    monkeypatch.setattr(watch, "_PACKAGE", f"{Path(__file__).parents[1]}{os.sep}")
    found = _innermost(thread.ident)
    go_on.set()
    thread.join()
    assert re.fullmatch(r"engine\.test_watch\.outer:\d+ > engine\.test_watch\.inner:\d+", found)
