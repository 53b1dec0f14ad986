"""Object stores in processes that are forked."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.remote import objects, store_process, stores
from maskmatch_scale.data.remote.fetch import read_bytes
from maskmatch_scale.data.remote.shard_cache import ShardCache
from tests.data.faulty_server import Fault, FaultyProxy
from tests.data.remote.common import FORK, in_processes, wait_until

ROOT = Path(__file__).parents[3]
_RANK = """
import multiprocessing, sys
from pathlib import Path
from maskmatch_scale.data.remote import store_process, stores
from maskmatch_scale.data.remote.fetch import read_bytes
from maskmatch_scale.data.remote.shard_cache import ShardCache
from maskmatch_scale.data.remote.transfer import FetchOptions

url, folder = sys.argv[1:]
options = FetchOptions(Path(folder) / "cache", limit_bytes=10**9, timeout_s=10, attempts=3)

def load(name):
    cache = ShardCache(options)
    assert cache.fetch(f"{url}/{name}").read_bytes() == (Path(folder) / "served" / name).read_bytes()
    assert not stores.are_lost()
    assert stores._stores, "obstore was not used in this process"
    assert not store_process._all

assert len(read_bytes(f"{url}/a.tar", options)) > 0
assert not stores._stores, "obstore was used in a process that is forked"
loaders = [multiprocessing.get_context("fork").Process(target=load, args=(f"{name}.tar",)) for name in "bc"]
for loader in loaders:
    loader.start()
for loader in loaders:
    loader.join()
assert [loader.exitcode for loader in loaders] == [0, 0]
assert len(read_bytes(f"{url}/d.tar", options)) > 0
"""


def test_a_rank_and_its_loader_processes(bucket, folder, tmp_path):
    url = f"s3://{bucket.name}/shards"
    done = subprocess.run([sys.executable, "-c", _RANK, url, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_it_finds_the_modules_that_its_starter_finds(bucket, folder, options, tmp_path, monkeypatch):
    """Neither the working directory nor what is installed decides."""
    (tmp_path / "queue.py").write_text("raise SystemExit('another module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", [path or str(ROOT) for path in sys.path])
    assert read_bytes(f"s3://{bucket.name}/shards/a.tar", options) == (folder / "a.tar").read_bytes()


def test_a_process_that_was_forked_too_late(bucket, folder, options, monkeypatch):
    """Without the other process this would wait for ever."""
    url = f"s3://{bucket.name}/shards"
    with monkeypatch.context() as patch:
        patch.setattr(objects, "_may_be_asked_here", lambda: True)
        assert read_bytes(f"{url}/a.tar", options) == (folder / "a.tar").read_bytes()

    def work(number):
        assert stores.are_lost()
        assert read_bytes(f"{url}/b.tar", options) == (folder / "b.tar").read_bytes()

    assert in_processes(1, work) == [0]
    assert not stores.are_lost()


def test_one_process_for_one_after_the_other(bucket, folder, options):
    cache = ShardCache(options)
    for name in "abcd":
        cache.fetch(f"s3://{bucket.name}/shards/{name}.tar", (folder / f"{name}.tar").stat().st_size)
    with pytest.raises(BadSample, match="HTTP 404"):
        cache.fetch(f"s3://{bucket.name}/shards/none.tar")
    assert len(store_process._all) == len(store_process._idle) == 1


def test_a_process_that_is_killed(bucket, folder, options):
    url = f"s3://{bucket.name}/shards/a.tar"
    read_bytes(url, options)
    for process in store_process._all:
        os.kill(process._process.pid, signal.SIGKILL)
        process._process.wait()
    assert read_bytes(url, options) == (folder / "a.tar").read_bytes()
    assert len(store_process._all) == 1


def test_it_ends_with_the_process_that_started_it(bucket, options):
    pipe = FORK.SimpleQueue()

    def work():
        objects._may_be_asked_here = lambda: False
        read_bytes(f"s3://{bucket.name}/shards/a.tar", options)
        pipe.put([process._process.pid for process in store_process._all])
        time.sleep(60)

    starter = FORK.Process(target=work)
    starter.start()
    (asking,) = pipe.get()
    assert _lives(asking)
    starter.kill()
    starter.join()
    wait_until(lambda: not _lives(asking))


def test_it_ends_also_while_a_store_does_not_answer(bucket, monkeypatch):
    pipe = FORK.SimpleQueue()
    with FaultyProxy(bucket.server, {"*": Fault(stall_after=0)}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)

        def work():
            process = store_process._Process()
            pipe.put(process._process.pid)
            process.ask(["read", f"s3://{bucket.name}/shards/a.tar", 0, None, 3600.0], 3600.0)
            time.sleep(3600)

        starter = FORK.Process(target=work)
        starter.start()
        asking = pipe.get()
        wait_until(lambda: proxy.gets() == 1)
        starter.kill()
        starter.join()
        wait_until(lambda: not _lives(asking))


def _lives(pid: int) -> bool:
    with suppress(OSError), Path(f"/proc/{pid}/stat").open() as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False
