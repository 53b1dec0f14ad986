"""Files are fetched once, by whichever process or thread needs them first, and in the background."""

import multiprocessing
import pickle
import random

import pytest

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.remote.shard_cache import ShardCache
from tests.data.faulty_server import Fault, FaultyServer
from tests.data.remote.common import FORK, SIZE, files_in, in_processes, known, wait_until


def test_a_file_is_fetched_once(folder, options):
    with FaultyServer(folder) as server:
        cache = ShardCache(options)
        for _ in range(3):
            path = cache.fetch(f"{server.url}/a.tar", **known(folder / "a.tar"))
            assert path.read_bytes() == (folder / "a.tar").read_bytes()
        assert [request.sent for request in server.requests] == [SIZE]
    assert files_in(options.cache) == [path.name]


def test_a_file_of_which_nothing_is_known(folder, options):
    with FaultyServer(folder) as server:
        cache = ShardCache(options)
        with cache.open(f"{server.url}/a.tar") as first, cache.open(f"{server.url}/a.tar") as second:
            assert first.read() == second.read() == (folder / "a.tar").read_bytes()
        assert server.gets() == 1


def test_a_cached_file_of_another_size_is_fetched_again(folder, options):
    with FaultyServer(folder) as server:
        cache = ShardCache(options)
        url, facts = f"{server.url}/a.tar", known(folder / "a.tar")
        cache.fetch(url, **facts).write_bytes(b"damaged")
        assert cache.fetch(url, **facts).read_bytes() == (folder / "a.tar").read_bytes()
        assert server.gets() == 2


def test_one_checksum_is_one_file_wherever_it_lies(folder, options):
    (folder / "copy.tar").write_bytes((folder / "a.tar").read_bytes())
    with FaultyServer(folder) as server:
        cache = ShardCache(options)
        first = cache.fetch(f"{server.url}/a.tar", **known(folder / "a.tar"))
        assert cache.fetch(f"{server.url}/copy.tar", **known(folder / "a.tar")) == first
        assert server.gets() == 1


def test_processes_fetch_a_file_once(folder, options):
    with FaultyServer(folder, {"*": Fault(delay_s=0.05)}) as server:
        facts = {name: known(folder / f"{name}.tar") for name in "abcd"}

        def work(number):
            cache = ShardCache(options)
            for name in random.Random(number).sample("abcd", 4):
                with cache.open(f"{server.url}/{name}.tar", **facts[name]) as file:
                    assert file.read() == (folder / f"{name}.tar").read_bytes()

        assert in_processes(6, work) == [0] * 6
        assert {name: server.gets(f"{name}.tar") for name in "abcd"} == dict.fromkeys("abcd", 1)
    assert len(files_in(options.cache)) == 4


def test_prefetch(folder, options):
    with FaultyServer(folder, {"bad.tar": Fault(status=500), "*": Fault(delay_s=0.2)}) as server:
        cache = ShardCache(options)
        cache.prefetch(f"{server.url}/bad.tar")
        cache.prefetch("pipe:exit 1")
        cache.prefetch("nonsense")
        for _ in range(3):
            cache.prefetch(f"{server.url}/a.tar")
        # It is waited for, not fetched again.
        assert cache.fetch(f"{server.url}/a.tar").read_bytes() == (folder / "a.tar").read_bytes()
        assert server.gets("a.tar") == 1
        wait_until(lambda: not cache._here().prefetching)
        for name in "bcdefgh":
            cache.prefetch(f"{server.url}/{name}.tar")
        wait_until(lambda: not cache._here().prefetching)
        assert sum(server.gets(f"{name}.tar") for name in "bcdefgh") == 4  # the others were too many
        with pytest.raises(BadSample, match="HTTP 500"):
            cache.fetch(f"{server.url}/bad.tar")


def test_prefetch_leaves_a_file_to_the_process_that_fetches_it(folder, options):
    with FaultyServer(folder, {"a.tar": Fault(delay_s=0.3)}) as server:
        other = FORK.Process(target=lambda: ShardCache(options).fetch(f"{server.url}/a.tar"))
        other.start()
        server.wait_for("a.tar")
        cache = ShardCache(options)
        cache.prefetch(f"{server.url}/a.tar")
        wait_until(lambda: not cache._here().prefetching)
        assert other.is_alive()
        other.join()
        assert server.gets() == 1


def test_a_cache_may_be_forked_and_pickled(folder, options):
    with FaultyServer(folder) as server:
        cache = ShardCache(options)
        cache.prefetch(f"{server.url}/a.tar")
        cache.fetch(f"{server.url}/b.tar")

        def work(number):
            for copy in (cache, pickle.loads(pickle.dumps(cache))):
                copy.prefetch(f"{server.url}/{'cdef'[number]}.tar")
                copy.fetch(f"{server.url}/a.tar")
                copy.fetch(f"{server.url}/{'cdef'[number]}.tar")

        assert in_processes(4, work) == [0] * 4
        assert [request.sent for request in server.requests] == [SIZE] * 6
    assert pickle.loads(pickle.dumps(options)) == options


def test_those_that_wait_for_a_file_do_not_try_it_again(folder, options):
    """All loader processes want a lost shard at about the same time: one of them goes through all tries."""
    with FaultyServer(folder, {"*": [Fault(status=500)]}) as server:
        context = multiprocessing.get_context("fork")
        results = context.Queue()

        def fetch():
            try:
                ShardCache(options).open(f"{server.url}/lost.tar", 5, "0" * 64)
            except BadSample as error:
                results.put((error.reason, str(error)))

        readers = [context.Process(target=fetch) for _ in range(4)]
        for reader in readers:
            reader.start()
        met = [results.get(timeout=60) for _ in readers]
    assert {reason for reason, _ in met} == {"shard_unreadable"}
    assert all("lost.tar" in message for _, message in met)
    # Who came too late to wait tries for itself.
    assert len(server.requests) <= 2 * options.attempts
