"""The thread that watches other ranks: its parts. `tests/distributed/test_drills.py` has the whole."""

import faulthandler
import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from benchmarks.drill_hosts.hosts import Hosts, why_no_hosts
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


_RANK = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch import distributed
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.setup import start
from maskmatch_scale.engine.watch import watch_ranks
from maskmatch_scale.recipe import EngineRecipe

recipe = EngineRecipe(library="accelerate", zero_stage=0, precision="fp32", threads=1, collective_timeout_s=20)
runtime = start(Place.from_environment(), recipe)
log = Path(sys.argv[1]) / f"rank-{runtime.rank}.txt"
with watch_ranks(runtime, recipe.collective_timeout_s) as watch, watch.logging_to(log, log.with_suffix(".collectives")):
    distributed.all_reduce(torch.zeros(1))
    if runtime.rank == int(sys.argv[2]):
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.all_reduce(torch.zeros(1))
"""


@pytest.mark.distributed
@pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))
@pytest.mark.parametrize("killed", [1, 0])
def test_a_rank_that_is_killed_on_another_host_is_named(tmp_path, killed):
    """The error of gloo has only the address of the connection. Rank 0 has the store that ranks write to."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    with Hosts(2) as hosts:
        environment |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500"}
        printed = [tmp_path / f"printed-{rank}.txt" for rank in range(2)]
        ranks = []
        for rank, host in enumerate(hosts):
            command = [sys.executable, "-c", _RANK, tmp_path, killed]
            with printed[rank].open("wb") as out:
                ranks.append(host.start(command, env=environment | {"RANK": str(rank)}, stdout=out, stderr=out))
        codes = [process.wait(timeout=300) for process in ranks]
    text = printed[1 - killed].read_text()
    assert codes[1 - killed] == 1, text
    line = rf"maskmatch: error: rank {1 - killed}: another rank has died: rank {killed} \(host host-{killed + 1}, "
    assert re.search(line, text), text
