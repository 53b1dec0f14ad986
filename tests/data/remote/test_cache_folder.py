"""The bound of a cache folder and its locks, with processes that are killed and disks that fill up."""

import dataclasses
import errno
import fcntl
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.remote.shard_cache import ShardCache
from tests.data.faulty_server import Fault, FaultyServer
from tests.data.remote.common import FORK, SIZE, files_in, in_processes, known, wait_until


def test_the_least_recently_used_goes(folder, options):
    cache = ShardCache(dataclasses.replace(options, limit_bytes=3 * SIZE))
    (options.cache / "somebody's.tar").write_bytes(bytes(10 * SIZE))
    with FaultyServer(folder) as server:

        def fetch(name):
            return cache.fetch(f"{server.url}/{name}.tar", **known(folder / f"{name}.tar"))

        for age, name in ((300, "a"), (200, "b"), (100, "c")):
            os.utime(fetch(name), (time.time() - age,) * 2)
        fetch("a")  # a use
        before = fetch("a").stat().st_mtime
        fetch("a")
        assert fetch("a").stat().st_mtime == before  # not noted again within a minute
        kept = {name: fetch(name) for name in "a"}
        opened = (options.cache / f"sha256-{known(folder / 'b.tar')['sha256']}").open("rb")
        fetch("d")
        assert server.gets() == 4
        assert kept["a"].exists()
        assert opened.read() == (folder / "b.tar").read_bytes()  # dropped, but still readable
        opened.close()
        fetch("b")
        assert server.gets() == 5
    assert (options.cache / "somebody's.tar").exists()
    assert sum((options.cache / name).stat().st_size for name in files_in(options.cache)) == 13 * SIZE


@pytest.mark.parametrize("facts", [{"size": SIZE}, {}], ids=["size known", "size told"])
def test_a_file_larger_than_the_cache(folder, options, facts):
    with FaultyServer(folder, {"c.tar": Fault(chunked=True)}) as server:
        cache = ShardCache(dataclasses.replace(options, limit_bytes=SIZE - 1))
        for name in "ac":
            with pytest.raises(DataError, match=r"raise data\.cache_gb") as caught:
                cache.fetch(f"{server.url}/{name}.tar", **facts)
            assert not isinstance(caught.value, BadSample)
    assert files_in(options.cache) == []


def test_a_full_disk(folder, options, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "scandir", full)
    with FaultyServer(folder) as server, pytest.raises(DataError, match=r"cache: the disk is full.*data\.cache_dir"):
        ShardCache(options).fetch(f"{server.url}/a.tar")


def test_a_disk_that_fills_up(folder, options):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    path_open = Path.open

    def full(self, mode="r", *args, **kwargs):
        file = path_open(self, mode, *args, **kwargs)
        if mode == "x+b":
            os.dup2(os.open("/dev/full", os.O_RDWR), file.fileno())
            file.truncate = lambda size: size  # a device has no length
        return file

    with FaultyServer(folder) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(DataError, match=r"the disk is full"):
            ShardCache(options).fetch(f"{server.url}/a.tar")
    assert files_in(options.cache) == []


def test_a_folder_that_cannot_be_made(tmp_path, options):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache: Not a directory.*data\.cache_dir"):
        ShardCache(dataclasses.replace(options, cache=tmp_path / "file" / "cache"))


def test_leftovers_of_the_killed_are_removed(folder, options):
    cache = ShardCache(options)
    leftover = options.cache / f".url-{'0' * 64}.{'0' * 16}.part"
    leftover.write_bytes(bytes(1000))
    with FaultyServer(folder) as server:
        path = cache.fetch(f"{server.url}/a.tar")
    assert files_in(options.cache) == [path.name]


@pytest.mark.parametrize("lengths", ["known", "told", "unknown"])
def test_the_bound_holds_and_nobody_fails(folder, options, lengths):
    """Six processes, eight files, room for two and a half."""
    options = dataclasses.replace(options, limit_bytes=5 * SIZE // 2)
    fault = Fault(chunked=True) if lengths == "unknown" else Fault()
    facts = {name: known(folder / f"{name}.tar") if lengths == "known" else {} for name in "abcdefgh"}

    def work(number):
        cache = ShardCache(options)
        for name in random.Random(number).sample("abcdefgh", 8):
            cache.prefetch(f"{server.url}/{name}.tar", **facts[name])
            with cache.open(f"{server.url}/{name}.tar", **facts[name]) as file:
                assert file.read() == (folder / f"{name}.tar").read_bytes()

    with FaultyServer(folder, {"*": fault}) as server:
        processes = [FORK.Process(target=work, args=(number,)) for number in range(6)]
        for process in processes:
            process.start()
        most = 0
        while any(process.is_alive() for process in processes):
            most = max(most, bytes_in(options.cache))
            time.sleep(0.002)
        assert [process.exitcode for process in processes] == [0] * 6
    assert SIZE < most <= options.limit_bytes


def bytes_in(cache: Path) -> int:
    """What all files take, counted while none is begun or dropped."""
    if not (cache / ".room.lock").exists():
        return 0
    with (cache / ".room.lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = {}
        for path in list(cache.iterdir()):
            with suppress(FileNotFoundError):
                status = path.stat()
                sizes[status.st_ino] = status.st_size  # once, if it is renamed meanwhile
        return sum(sizes.values())


def test_a_killed_process_blocks_nobody(folder, options):
    options = dataclasses.replace(options, limit_bytes=SIZE)
    facts = known(folder / "a.tar")
    with FaultyServer(folder, {"a.tar": Fault(times=1, stall_after=100_000)}) as server:

        def work():
            ShardCache(options).fetch(f"{server.url}/a.tar", **facts)

        victim, waiting = FORK.Process(target=work), FORK.Process(target=work)
        victim.start()
        server.wait_for("a.tar", 100_000)
        wait_for_partial_file(options.cache)
        waiting.start()
        os.kill(victim.pid, signal.SIGKILL)
        waiting.join()
        assert waiting.exitcode == 0
        victim.join()
        assert server.gets("a.tar") == 2
    assert files_in(options.cache) == [f"sha256-{facts['sha256']}"]


def test_a_child_does_not_keep_its_parents_locks(folder, options):
    """A worker that is forked while its parent fetches; the parent is killed, the worker lives on."""
    reader, writer = os.pipe()
    with FaultyServer(folder, {"a.tar": Fault(times=1, stall_after=100_000)}) as server:

        def parent():
            cache = ShardCache(options)
            cache.prefetch(f"{server.url}/a.tar")
            wait_for_partial_file(options.cache)
            if (child := os.fork()) == 0:
                signal.pause()
            os.write(writer, child.to_bytes(8, "little"))
            signal.pause()

        victim = FORK.Process(target=parent)
        victim.start()
        child = int.from_bytes(os.read(reader, 8), "little")
        try:
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            cache = ShardCache(options)
            assert cache.fetch(f"{server.url}/a.tar").read_bytes() == (folder / "a.tar").read_bytes()
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(reader)
            os.close(writer)
    assert len(files_in(options.cache)) == 1


def wait_for_partial_file(cache: Path) -> None:
    wait_until(lambda: any(name.endswith(".part") for name in files_in(cache)))


def test_without_locks(folder, options, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    cache = ShardCache(dataclasses.replace(options, limit_bytes=2 * SIZE))
    old, young = (options.cache / f".url-{digit * 64}.{'0' * 16}.part" for digit in "01")
    for partial, age in ((old, 3600), (young, 1)):
        partial.touch()
        os.utime(partial, (time.time() - age,) * 2)
    with FaultyServer(folder) as server:

        def work(number):
            for name in "abc":
                with cache.open(f"{server.url}/{name}.tar", **known(folder / f"{name}.tar")) as file:
                    assert file.read() == (folder / f"{name}.tar").read_bytes()

        work(0)
        assert not old.exists()
        assert young.exists()
        assert in_processes(3, work) == [0] * 3
