"""How long a file that does not come is waited for. Without a limit these tests would take minutes to hours."""

import dataclasses
import pickle

import pytest

from maskmatch_scale.data.faults import NotFetched
from maskmatch_scale.data.remote.shard_cache import ShardCache
from tests.data.faulty_server import Fault, FaultyServer
from tests.data.remote.common import FORK, SIZE, known


@pytest.fixture
def tireless(options):
    """Options that would wait for hours."""
    return dataclasses.replace(options, timeout_s=60, attempts=1000)


@pytest.mark.parametrize("fault", [Fault(stall_after=0), Fault(stall_after=100_000), Fault(status=503)])
def test_silence_ends_a_fetch(folder, tireless, fault):
    with FaultyServer(folder, {"a.tar": fault}) as server, pytest.raises(NotFetched, match=r"a\.tar") as caught:
        ShardCache(tireless).open(f"{server.url}/a.tar", **known(folder / "a.tar"), patience_s=0.5)
    assert caught.value.may_pass
    assert pickle.loads(pickle.dumps(caught.value)).may_pass


def test_a_file_that_is_not_there_is_not_waited_for(folder, tireless):
    with FaultyServer(folder) as server, pytest.raises(NotFetched) as caught:
        ShardCache(tireless).open(f"{server.url}/none.tar", patience_s=1000)
    assert not caught.value.may_pass


def test_bytes_that_come_renew_the_patience(folder, tireless):
    """Five cuts, each after a part of the file and a second; together they take longer than the patience."""
    data = bytes(range(256)) * 6 * SIZE
    (folder / "large.tar").write_bytes(data[: 6 * SIZE])
    faults = {"large.tar": Fault(times=5, delay_s=0.7, cut_after=SIZE)}
    with FaultyServer(folder, faults) as server:
        facts = known(folder / "large.tar")
        with ShardCache(tireless).open(f"{server.url}/large.tar", **facts, patience_s=3.0) as file:
            assert len(file.read()) == 6 * SIZE
        assert server.gets() == 6


def test_another_process_that_gets_nothing_is_not_waited_for(folder, tireless):
    with FaultyServer(folder, {"a.tar": Fault(stall_after=0)}) as server:
        other = FORK.Process(target=lambda: ShardCache(tireless).fetch(f"{server.url}/a.tar"))
        other.start()
        server.wait_for("a.tar")
        try:
            with pytest.raises(NotFetched, match="another process"):
                ShardCache(tireless).open(f"{server.url}/a.tar", patience_s=0.5)
        finally:
            other.kill()
            other.join()
        assert server.gets() == 1


def test_without_patience_only_what_is_there_is_opened(folder, tireless):
    with FaultyServer(folder) as server:
        cache = ShardCache(tireless)
        with pytest.raises(NotFetched):
            cache.open(f"{server.url}/a.tar", patience_s=0)
        assert server.gets() == 0
        cache.fetch(f"{server.url}/a.tar")
        cache.open(f"{server.url}/a.tar", patience_s=0).close()


def test_figures_of_what_was_fetched(folder, options):
    with FaultyServer(folder, {"a.tar": Fault(times=2, status=503)}) as server:
        cache = ShardCache(options)
        cache.fetch(f"{server.url}/a.tar")
        cache.fetch(f"{server.url}/a.tar")
        cache.fetch(f"{server.url}/b.tar")
        figures = cache.take_figures()
    assert (figures.shards, figures.bytes, figures.failed_tries, figures.damaged) == (2, 2 * SIZE, 2, 0)
    assert figures.seconds > 0
    assert cache.take_figures().shards == 0
    assert cache.arrivals == 2
